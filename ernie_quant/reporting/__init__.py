"""What a run did to every tensor: rows, tables, a page, pictures."""

"""AI Studio."""

"""What will be done: every decision and every check, from headers and config alone."""

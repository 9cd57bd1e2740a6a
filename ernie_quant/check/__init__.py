"""Is a result what it says? Read back from disk."""

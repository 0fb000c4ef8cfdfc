"""Items for a user: those that a caller names, ranked, and those that are recommended."""

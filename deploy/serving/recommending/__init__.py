"""Items for a user: ranks the items that a caller names, and recommends items."""

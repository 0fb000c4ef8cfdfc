"""A ranker that attends to the items a user looked at lately, as DIN does."""

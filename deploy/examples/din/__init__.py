"""A ranker with attention over a user's latest items, after Deep Interest Network (DIN)."""

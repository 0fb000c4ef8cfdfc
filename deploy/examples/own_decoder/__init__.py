"""A decoder of one's own, for clicks that are no JSON."""

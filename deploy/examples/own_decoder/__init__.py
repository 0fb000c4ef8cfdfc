"""A custom decoder, for clicks that are not JSON."""

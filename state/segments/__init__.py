"""Segments: named groups of users by what their profiles say. Expressions, and what is kept of members."""

"""Segments: named groups of users, defined by expressions over their profiles, and their stored members."""

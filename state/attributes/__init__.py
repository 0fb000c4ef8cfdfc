"""Attributes of users and items, read from compacted topics."""

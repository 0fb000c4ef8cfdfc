"""Versions, complete or absent, and control: which of them should be used."""

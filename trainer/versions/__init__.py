"""Versions out of a trainer, and a trainer out of a version."""

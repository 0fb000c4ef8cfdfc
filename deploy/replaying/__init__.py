"""Clicks into the topic: of recordings, each at its time, or of synthetic shoppers."""

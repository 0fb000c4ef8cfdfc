"""Ranking code that the trainer and serving share: crosses and transitions."""

"""Trials: additional trainers on the same training log, their location, and the comparison with the live trainer."""

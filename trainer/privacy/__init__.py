"""Differential privacy of what is learned for others: who takes part, what noise is added, and what it costs; see `trainer/PRIVACY.md`."""

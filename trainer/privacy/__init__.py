"""Differential privacy of shared weights: participation, noise, and its accounting; see `trainer/PRIVACY.md`."""

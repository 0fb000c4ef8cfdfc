"""Differential privacy of shared weights: participation, noise, and its accounting; see `docs/model/privacy.md`."""

"""Splitting: while a rollout is open, a share of the users is answered by the trial's workers, and each answer is an exposure."""

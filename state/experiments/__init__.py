"""Experiments: another trainer on the same training log, its comparison with the live one, and its rollout to users."""

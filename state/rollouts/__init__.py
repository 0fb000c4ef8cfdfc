"""Rollouts: a trial serves a growing share of users, and measured results decide whether it continues."""

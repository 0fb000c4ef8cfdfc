"""Rollouts: a growing share of users is answered by a trial, and what they do decides how it goes on."""

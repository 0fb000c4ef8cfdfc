"""Trials: second trainers on the same training log, where they lie, and how what they predict compares with what the live one does."""

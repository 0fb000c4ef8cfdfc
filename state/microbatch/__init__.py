"""Micro-batches: each is one record of the training log and one training step."""

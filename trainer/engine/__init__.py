"""Computes a training step: scores, gradients, the guard, and the optimizers that apply the gradients."""

"""Computes answers from a host's stores: profiles, ranked and recommended items, explanations, tensors, segments."""

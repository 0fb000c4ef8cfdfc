"""Stores serving's embedding rows of many versions, so that an answer reads exactly one version."""

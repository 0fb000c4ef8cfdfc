"""Serving's embedding rows of many versions: an answer reads exactly one."""

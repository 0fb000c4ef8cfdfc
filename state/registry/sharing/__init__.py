"""Sharing a registry between hosts through an object store, and keeping each host's directory in sync with it."""

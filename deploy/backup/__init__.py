"""Copies of what was learned, in a directory or an object store: made beside the running system, and restored on an empty machine."""

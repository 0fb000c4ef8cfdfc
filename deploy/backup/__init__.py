"""Backup of a running system to a directory or an object store, and restore on an empty machine."""

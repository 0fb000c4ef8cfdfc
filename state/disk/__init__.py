"""Durable files, one writer a directory, and what the LMDB stores share."""

"""Durable files, directory locks, and the base classes of the LMDB stores."""

"""Follows the micro-batch topic and the registry, and writes a host's stores."""

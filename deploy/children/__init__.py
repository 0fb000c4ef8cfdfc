"""Supervised child processes: they end with their parent, are restarted, and write their logs to files."""

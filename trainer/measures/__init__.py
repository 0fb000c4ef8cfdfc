"""Progressive validation: each row is scored before it is learned from."""

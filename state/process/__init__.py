"""What every process of ours has: kill points for tests, the name of its actor, a quiet standard error."""

"""Makes versions from a trainer, and restores a trainer from a version."""

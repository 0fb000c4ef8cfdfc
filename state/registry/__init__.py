"""Registry of model versions, each complete or absent, and of control, which decides which of them to use."""

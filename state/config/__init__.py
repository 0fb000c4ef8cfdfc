"""Settings: each is declared once, read from file, variables and flags, and checked alone and together."""

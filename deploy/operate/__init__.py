"""What an operator changes or looks up: pins, rollbacks, versions, settings."""

"""Commands of operators: pins, rollbacks, erasures, versions, history."""

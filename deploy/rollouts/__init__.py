"""`springtide rollout`: shifts traffic to a trial step by step, and advances, halts or reverts it by what users do."""

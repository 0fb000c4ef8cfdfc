"""`springtide rollout`: takes a trial from a few users to all of them, or back, by what they do."""

"""One budget of disk space, `storage.budget_gb`: the parts' shares of it, what each takes, and what is done where a disk is full."""

"""The disk budget `storage.budget_gb`: each part's share, its measured use, and the behaviour when a disk is full."""

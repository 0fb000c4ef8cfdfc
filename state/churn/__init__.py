"""The churn model's contract between trainer and serving: its moments, its inputs, and its tensors in a version."""

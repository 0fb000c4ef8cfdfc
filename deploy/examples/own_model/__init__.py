"""A custom model: a preprocessing with quantile buckets, and a tower with a feature cross and a residual block."""

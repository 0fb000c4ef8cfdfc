"""A model of one's own: a preprocessing with quantile buckets, a tower with a feature cross and a residual block."""

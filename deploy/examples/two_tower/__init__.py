"""A two-tower ranker, learned with softmax over what others clicked meanwhile."""

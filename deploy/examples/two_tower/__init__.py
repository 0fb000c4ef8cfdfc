"""A two-tower ranker, trained with a softmax over the categories that other users clicked in the same batch."""

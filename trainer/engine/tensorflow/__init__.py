"""The engine for any ranker on any device: one TensorFlow graph, differentiated by TensorFlow."""

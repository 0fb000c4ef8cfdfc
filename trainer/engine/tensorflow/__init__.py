"""The engine for any ranker on any device: everything in one graph, differentiated by TensorFlow."""

"""The Beam job that turns clicks into micro-batches and user histories."""

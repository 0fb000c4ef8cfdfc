"""A version for others to run: as a SavedModel for TensorFlow Serving, or as one file for a device."""

"""Exports a version: as a SavedModel for TensorFlow Serving, or as one file for a device."""

"""Validation of live clicks: computes statistics of the trainer's input per window, and detects anomalies and drift."""

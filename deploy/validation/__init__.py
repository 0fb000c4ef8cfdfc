"""The process that takes statistics of what the trainer learns from, window by window, and looks for anomalies and drift."""

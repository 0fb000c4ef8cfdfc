"""The long-lived training process: its tables, model, training step and published versions."""

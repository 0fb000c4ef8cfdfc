"""The micro-batch: one record of the training log, one step of the trainer."""

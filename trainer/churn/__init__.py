"""Learns who leaves, from the rows of micro-batches: examples that wait for their label, the regression, its measures."""

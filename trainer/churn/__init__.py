"""Learns from micro-batches which users churn: examples that wait for their label, the regression, its metrics."""

"""Reads files of clicks and attributes (CSV, JSON lines and Parquet) as columns in chunks."""

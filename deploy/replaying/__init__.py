"""Sends data into the topics: recorded clicks at their times, synthetic clicks, and attributes from files."""

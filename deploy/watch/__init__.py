"""Monitoring for operators: metrics of the running loop, its accounting, and a text screen."""

"""A year of synthetic shoppers through the cores of every part: what stays flat, and how good answers are at its end."""

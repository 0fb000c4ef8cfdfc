"""Explains an answer: splits its difference from the answer for unknown users into parts, each with its events."""

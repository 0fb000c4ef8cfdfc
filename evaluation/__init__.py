"""Scores Springtide on recorded clicks next to simple baselines: each click is predicted first and learned afterwards."""

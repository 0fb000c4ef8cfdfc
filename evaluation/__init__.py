"""Scores Springtide and simple baselines on recorded clicks: each click is predicted first and learned afterwards."""

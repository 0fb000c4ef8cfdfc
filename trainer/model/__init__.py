"""The model: its inputs, its formula and its candidates."""

"""What the model is: its inputs, its formula, its candidates."""

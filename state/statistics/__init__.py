"""Statistics of training rows, the schema that they are held against, and what is found, in TensorFlow Data Validation's formats."""

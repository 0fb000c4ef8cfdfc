"""Statistics of training rows, the schema that they are held against, what is found, in TensorFlow Data Validation's formats, and intervals that hold at every look."""

"""Statistics of training rows, schema checks in TensorFlow Data Validation's formats, and anytime-valid intervals."""

"""Examples: settings of public recordings, and a model of one's own."""

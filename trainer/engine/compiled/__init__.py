"""An optimized CPU engine for the default ranker: compiled loops with hand-written derivatives."""

"""The default ranker on a processor, an optimisation: compiled loops with derivatives written by hand."""

"""The network edge of serving: connections and their limits, tokens and TLS."""

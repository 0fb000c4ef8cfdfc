"""What stands between the network and the answers: connections and their limits, tokens, TLS, the way in and out."""

"""What benches of serving share: a client that counts, stores that are full, a worker, and the peer beside it."""

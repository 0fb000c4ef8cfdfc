"""Tables from ids to rows, with admission, expiry and eviction: embeddings, and counts of what came next."""

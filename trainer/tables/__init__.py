"""From ids to rows, grown, admitted, expired and evicted: embeddings, and counts of what came next."""

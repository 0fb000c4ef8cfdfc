"""From ids to rows, grown, admitted and expired: embeddings, and counts of what came next."""

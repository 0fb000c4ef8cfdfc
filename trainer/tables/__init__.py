"""Embedding tables: from ids to rows, grown, admitted and expired."""

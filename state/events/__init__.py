"""A click: bytes of a record to columns of events, and ids that carry no raw name."""

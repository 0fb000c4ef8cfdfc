"""A registry that several hosts share: what lies in an object store, and how each host's directory is kept in step with it."""

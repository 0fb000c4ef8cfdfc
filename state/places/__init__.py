"""File storage in a directory or an object store, behind one interface, `FilePlace`."""

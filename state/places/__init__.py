"""Places for files: a directory, or an object store, behind one door."""

"""Child processes: they die with their parent, are kept alive, and their last words are kept."""

"""File storage: the contract `FilePlace`, an object store that implements it, and a request counter."""

"""The HTTP API of serving: its endpoints, their requests and their responses."""

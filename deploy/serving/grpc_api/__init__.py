"""The answers over gRPC: the server, the messages, and the services that are offered."""

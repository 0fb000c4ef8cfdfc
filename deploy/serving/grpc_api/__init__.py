"""The answers over gRPC: the server, the messages, and the services that are offered."""

import os

# Read when grpc is loaded: else it writes into the worker's log what clients send, whatever that is.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

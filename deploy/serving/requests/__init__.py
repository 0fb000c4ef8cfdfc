"""Receives requests over HTTP and gRPC: connections and their limits, access, parameters and responses."""

import os

# grpc reads this when it is imported. Without it, grpc writes data sent by clients to the worker's log.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

"""The gRPC API of serving: the server, the messages and the services."""

import os

# grpc reads this when it is imported. Without it, grpc writes data sent by clients to the worker's log.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

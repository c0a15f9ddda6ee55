"""Carries data between any two processes: tensors as messages, identities, and gRPC channels."""

import os

# gRPC's C library prints its own lines to stderr and reads this when it is first imported. Every error
# that matters reaches Python as an exception.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

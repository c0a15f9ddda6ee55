"""What crosses the network between any two processes: tensors, identities and the channels they use."""

import os

# gRPC's C library prints its own lines to stderr and reads this when it is first imported. Every error
# that matters reaches Python as an exception.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

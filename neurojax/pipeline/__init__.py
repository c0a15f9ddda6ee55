import neurojax.wire  # noqa: F401  quiets gRPC before any file here imports it

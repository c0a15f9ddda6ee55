"""Makes every gRPC channel and server. Connections are in plaintext: any protection belongs here.

Both ends bound the size of messages and find a dead peer within about 15 seconds.
"""

import grpc

from neurojax.wire.identity import printable

CallError = grpc.aio.AioRpcError
"""The exception of a call that failed."""

_MOST_CALLS = 256
"""Calls that a server takes at the same time."""


def open_channel(address: str, *, limit: int) -> grpc.aio.Channel:
  """Open a channel to a server. Nothing is connected before the first call.

  Args:
    address: "host:port".
    limit: Bytes of the largest message in either direction.
  """
  # Connections of its own: those that channels share remember that nobody answered, and a server that was
  # started anew at the address would be refused for seconds.
  own = ("grpc.use_local_subchannel_pool", 1)
  return grpc.aio.insecure_channel(address, options=[*_options(limit), own])


def make_server(*, limit: int) -> grpc.aio.Server:
  """Make a server that listens nowhere yet.

  Args:
    limit: Bytes of the largest message in either direction.
  """
  return grpc.aio.server(options=_options(limit), maximum_concurrent_rpcs=_MOST_CALLS)


def listen(server: grpc.aio.Server, address: str) -> str:
  """Have a server take connections at an address, once it is started.

  Args:
    address: "host:port"; port 0 takes a free one.
  Returns: The address with the port that was taken.
  Raises: OSError: the address cannot be had.
  """
  try:
    port = server.add_insecure_port(address)
  except RuntimeError as error:
    raise OSError(
      f"cannot listen on {address}: the address is taken or not this machine's"
    ) from error
  return f"{address.rsplit(':', 1)[0]}:{port}"


def brief(error: BaseException) -> str:
  """Say in a few words what the error of a call is."""
  if isinstance(error, grpc.aio.AioRpcError):
    return f"{error.code().name}: {printable(error.details())}"
  return printable(error) or type(error).__name__


def _options(limit: int) -> list[tuple[str, int]]:
  return [
    ("grpc.max_receive_message_length", limit),
    ("grpc.max_send_message_length", limit),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
  ]

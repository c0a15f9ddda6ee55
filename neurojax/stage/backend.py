"""Asks JAX for its devices, and says in one line if it has none of the kind that was asked for."""

import os

import jax


def devices() -> list[jax.Device]:
  """The devices of this process.

  Raises: ValueError: JAX has no device of the kind that JAX_PLATFORMS names.
  """
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:
    line = without_backend(error)
    if line is None:
      raise
    raise ValueError(line) from error


def without_backend(error: BaseException) -> str | None:
  """The text for an error that means: JAX has no device of the kind that JAX_PLATFORMS names.

  Returns: None for any other error.
  """
  platforms, trace = os.environ.get("JAX_PLATFORMS"), error.__traceback__
  while trace is not None and trace.tb_next is not None:
    trace = trace.tb_next
  if not platforms or trace is None:
    return None
  if not trace.tb_frame.f_code.co_filename.endswith(os.path.join("jax", "_src", "xla_bridge.py")):
    return None
  reason = str(error).partition(" (set JAX_PLATFORMS")[0]
  return (
    f"JAX_PLATFORMS={platforms}: JAX finds no such device here{': ' + reason if reason else ''}. "
    "Unset JAX_PLATFORMS, or install JAX for the device (docs.jax.dev/en/latest/installation.html)"
  )

"""What the command line makes of its process: environment, standard streams and log lines."""

import contextlib
import logging
import os
import sys
from collections.abc import MutableMapping
from io import TextIOWrapper
from typing import NoReturn, TextIO

LEVELS = ("debug", "info", "warning", "error")

_QUIET, _LOUD = {"TF_CPP_MIN_LOG_LEVEL": "3"}, {"GRPC_VERBOSITY": "ERROR"}
"""Keep XLA from writing to standard error, as `wire` keeps gRPC; what fails there is raised too."""


def log_level(arguments: list[str], environment: MutableMapping[str, str]) -> tuple[str, list[str]]:
  """The level of log lines, and the arguments without -v and --verbose.

  Raises: ValueError: NEUROJAX_LOG is no level.
  """
  end = arguments.index("--") if "--" in arguments else len(arguments)
  rest = [word for word in arguments[:end] if word not in ("-v", "--verbose")]
  verbose = len(rest) < end
  level = "debug" if verbose else environment.get("NEUROJAX_LOG", "") or "warning"
  if level not in LEVELS:
    raise ValueError(f"NEUROJAX_LOG={level}: one of {', '.join(LEVELS)}")
  return level, rest + arguments[end:]


def prepare(level: str) -> None:
  """Call once, before JAX and gRPC are imported: they read the environment then."""
  logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
  logger = logging.getLogger("neurojax")
  logger.setLevel(level.upper())
  for name, value in (_LOUD if level == "debug" else _QUIET).items():
    os.environ.setdefault(name, value)
  if level != "debug":
    for name in ("absl", "grpc", "orbax"):
      logging.getLogger(name).setLevel(logging.CRITICAL)
  if os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true", "yes", "on", "y", "t"):
    logger.warning("JAX_ENABLE_X64 is set: neurojax computes in 32 bits all the same")
    os.environ["JAX_ENABLE_X64"] = "0"


def open_streams() -> None:
  """Let what is written go somewhere, whatever the streams are.

  A closed stream leaves its number to the next file that is opened, and native code would write into
  that file: the null device takes the number. Text that the encoding has no character for is written
  with backslashes.
  """
  while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
    os.set_inheritable(number, True)
  os.close(number)
  if sys.stdout is None:
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
  if sys.stderr is None:
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
  """Write what standard output still holds; it is dropped if nobody reads any more.

  Raises: OSError: standard output takes no more.
  """
  try:
    sys.stdout.flush()
  except BrokenPipeError:
    discard_output()
  except OSError as error:
    discard_output()
    raise OSError(f"standard output: {error.strerror}") from error


def discard_output() -> None:
  """Send what standard output still holds to the null device: its reader is gone, or it is full."""
  _discard(sys.stdout)


def say_error(error: BaseException | str) -> None:
  """Print one line on standard error. The line is dropped if nobody reads it: the exit code remains."""
  try:
    print(f"neurojax: {error}", file=sys.stderr, flush=True)
  except OSError:
    discard_errors()


def discard_errors() -> None:
  """Send what standard error still holds to the null device: its reader is gone, or it is full."""
  _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
  null = os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, stream.fileno())
  os.close(null)


_INTERRUPTED: list[bool] = []


def note_interrupt() -> None:
  """Remember that Ctrl-C ended the work, which has cleaned up by now."""
  _INTERRUPTED.append(True)


def leave(code: int) -> NoReturn:
  """End the process. After Ctrl-C nobody waits for threads that still compile or read files."""
  if _INTERRUPTED:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    os._exit(code)
  sys.exit(code)

"""The command line: one file and one dataclass for each verb."""

import os
import sys
from collections.abc import Sequence

FAILED, USAGE, ENGINE, INTERRUPTED = 1, 2, 3, 130


def entry() -> None:
  """Run this process's command line, and end the process."""
  from neurojax.cli import process

  process.leave(main())


def main(argv: Sequence[str] | None = None) -> int:
  """Run a command line.

  Args:
    argv: Words after `neurojax`. Absent: those of this process, which is then made ready for it:
      environment, standard streams and log lines.
  Returns: The exit code.
  Raises: SystemExit: help was printed (0), or an option is wrong (2).
  """
  from neurojax.cli import process

  try:
    level, arguments = process.log_level(list(sys.argv[1:] if argv is None else argv), os.environ)
    if argv is None:
      process.open_streams()
      process.prepare(level)
    try:
      return _run(arguments)
    finally:
      process.flush_output()
  except KeyboardInterrupt:
    process.note_interrupt()
    return INTERRUPTED
  except BrokenPipeError:
    # Whoever read our output (head, say) has seen enough.
    process.discard_output()
    return 0
  except (ValueError, OSError) as error:
    process.say_error(error)
    return USAGE


def _run(arguments: list[str]) -> int:
  """Raises: KeyboardInterrupt, BrokenPipeError, SystemExit; ValueError: there is no such verb."""
  from neurojax.cli import process, verbs

  if not arguments or arguments[0] in ("-h", "--help"):
    print(verbs.overview(), end="")
    return 0
  if arguments[0] == "--version":
    import neurojax

    print(f"neurojax {neurojax.__version__}")
    return 0
  group = verbs.members(arguments[0])
  if group and arguments[1:2] in (["-h"], ["--help"]):
    print(f"usage: neurojax {arguments[0]} ...\n\n{verbs.listed(group)}")
    return 0
  from neurojax.cli.parse import parse, write_completion

  if arguments[0].startswith("--tyro-"):
    write_completion(arguments)
  verb = parse(*verbs.split(arguments))
  from neurojax.engine.api import EngineError

  try:
    return verb.run()
  except BrokenPipeError:
    raise
  except EngineError as error:
    process.say_error(error)
    return ENGINE
  except (ValueError, NotImplementedError, OSError, OverflowError, RecursionError) as error:
    process.say_error(error)
    return USAGE
  except (MemoryError, RuntimeError, AssertionError) as error:
    if line := _without_backend(error):
      process.say_error(line)
      return USAGE
    # JAX's own name for what a device refuses; importing JAX to name the class would take seconds.
    if not isinstance(error, MemoryError) and type(error).__name__ != "JaxRuntimeError":
      raise
    process.say_error(f"{type(error).__name__}: {error}")
    return ENGINE


def _without_backend(error: BaseException) -> str | None:
  if "jax" not in sys.modules:
    return None
  from neurojax.stage.backend import without_backend

  return without_backend(error)

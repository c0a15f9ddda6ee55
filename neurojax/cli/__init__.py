"""The command line: one file and one dataclass per verb."""

import dataclasses
import functools
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Protocol

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, subcommand

from neurojax.cli.bench import Bench
from neurojax.cli.chat import Chat
from neurojax.cli.convert import Convert
from neurojax.cli.data import Data
from neurojax.cli.demo import Demo
from neurojax.cli.evaluate import Eval
from neurojax.cli.export import Export
from neurojax.cli.generate import Generate
from neurojax.cli.inspect import Inspect
from neurojax.cli.plan import Planning
from neurojax.cli.probe import Probe
from neurojax.cli.pull import Pulling
from neurojax.cli.simulate import Simulate
from neurojax.cli.size import Size
from neurojax.cli.stage import Stage
from neurojax.cli.tokenize import Tokenize
from neurojax.cli.train import Train

FAILED, USAGE, ENGINE, INTERRUPTED = 1, 2, 3, 130


class Verb(Protocol):
  def run(self) -> int: ...


Verbs = (
  Annotated[Demo, subcommand("demo")]
  | Annotated[Inspect, subcommand("inspect")]
  | Annotated[Pulling, subcommand("pull")]
  | Annotated[Tokenize, subcommand("tokenize")]
  | Annotated[Convert, subcommand("convert")]
  | Annotated[Generate, subcommand("generate")]
  | Annotated[Chat, subcommand("chat")]
  | Annotated[Stage, subcommand("stage")]
  | Annotated[Probe, subcommand("probe")]
  | Annotated[Size, subcommand("size")]
  | Annotated[Planning, subcommand("plan")]
  | Annotated[Simulate, subcommand("simulate")]
  | Annotated[Data, subcommand("data")]
  | Annotated[Train, subcommand("train")]
  | Annotated[Export, subcommand("export")]
  | Annotated[Eval, subcommand("eval")]
  | Annotated[Bench, subcommand("bench")]
)

DESCRIPTION = """Ternary language models, sized, packed, cut into stages and run across unlike machines.

Exit codes: 0 done; 1 a check failed; 2 wrong use or a bad file; 3 a stage or engine failed; 130 interrupted; 143 ended by SIGTERM.
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Run a command line; returns the exit code."""
  logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
  try:
    verb = _parsed(list(sys.argv[1:] if argv is None else argv))
  except BrokenPipeError:
    return _read_enough()
  from neurojax.engine.api import EngineError

  try:
    return verb.run()
  except KeyboardInterrupt:
    return INTERRUPTED
  except BrokenPipeError:
    return _read_enough()
  except EngineError as error:
    print(f"neurojax: {error}", file=sys.stderr)
    return ENGINE
  except (ValueError, NotImplementedError, OSError, OverflowError, RecursionError) as error:
    print(f"neurojax: {error}", file=sys.stderr)
    return USAGE
  except (MemoryError, RuntimeError) as error:
    # JAX's own name for what a device refuses; importing JAX to name the class would take seconds.
    if isinstance(error, RuntimeError) and type(error).__name__ != "JaxRuntimeError":
      raise
    print(f"neurojax: {type(error).__name__}: {error}", file=sys.stderr)
    return ENGINE


def _parsed(arguments: list[str]) -> Verb:
  """Raises: SystemExit: help was asked for, or the arguments are none."""
  parse = functools.partial(
    tyro.cli,
    Verbs,  # pyrefly: ignore
    prog="neurojax",
    description=DESCRIPTION,
    args=arguments,
    config=(OmitArgPrefixes, OmitSubcommandPrefixes),
  )
  if arguments[:1] == ["train"]:
    # The keys of its configuration are options too; to list them here would import JAX.
    verb, rest = parse(return_unknown_args=True)
    return dataclasses.replace(verb, overrides=tuple(rest))
  return parse()


def _read_enough() -> int:
  """Whoever read our output (head, say) has seen enough."""
  sys.stderr.close()
  return 0

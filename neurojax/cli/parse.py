"""From a verb's options to its dataclass, and its help: tyro, with rules of ours for the help."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import operator
import os
import shutil
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, UseAppendAction, subcommand
from tyro.constructors import (
  ConstructorRegistry,
  PrimitiveConstructorSpec,
  PrimitiveTypeInfo,
  StructConstructorSpec,
  StructTypeInfo,
)

from neurojax.cli.process import discard_errors
from neurojax.cli.verbs import VERBS

_METAVARS = {str: "TEXT", int: "N", float: "NUMBER", Path: "FILE"}
_CONFIG = (OmitArgPrefixes, OmitSubcommandPrefixes)


class Verb(Protocol):
  def run(self) -> int: ...


def verb_class(name: str) -> type[Any]:
  """The dataclass of a verb; its module is imported."""
  module, _, of_class = VERBS[name].place.partition(":")
  return getattr(importlib.import_module(f"neurojax.cli.{module}"), of_class)


def parse(name: str, arguments: list[str]) -> Verb:
  """A verb with its options.

  Raises: SystemExit: help was asked for (0), or an option is wrong (2); what there is to say is
    printed.
  """
  of_class = verb_class(name)
  tyro._experimental_options["ansi_codes"] = (
    not os.environ.get("NO_COLOR") and sys.stdout.isatty() and sys.stderr.isatty()
  )
  parsed = functools.partial(
    tyro.cli,
    of_class,
    prog=f"neurojax {name}",
    description="",
    args=arguments,
    config=_CONFIG,
    registry=_registry(),
  )
  held = _Held(sys.stdout)
  try:
    with contextlib.redirect_stdout(held):
      if name == "train":
        # The keys of its configuration are options too; to list them here would import JAX.
        verb, rest = parsed(return_unknown_args=True)
        return dataclasses.replace(verb, overrides=tuple(rest))
      return parsed()
  except BrokenPipeError:
    # Standard output is held back here: nobody reads what tyro writes on standard error.
    discard_errors()
    raise SystemExit(2) from None
  finally:
    if text := held.getvalue():
      usage, _, options = text.partition("\n")
      width = min(shutil.get_terminal_size().columns, 100)
      usage = textwrap.fill(usage, width, subsequent_indent="    ", break_on_hyphens=False)
      print(usage, description(of_class.__doc__ or "", width), options.strip("\n"), sep="\n\n")


def write_completion(arguments: list[str]) -> None:
  """Write a shell's completion of all verbs: tyro's --tyro-write-completion SHELL PATH.

  Raises: SystemExit: always, as tyro ends here.
  """
  whole = [Annotated[verb_class(name), subcommand(name)] for name in VERBS if " " not in name]
  for group in dict.fromkeys(name.split()[0] for name in VERBS if " " in name):
    inner = [
      Annotated[verb_class(name), subcommand(name.split()[1])]
      for name in VERBS
      if name.startswith(f"{group} ")
    ]
    made = dataclasses.make_dataclass(group, [("what", functools.reduce(operator.or_, inner))])
    whole.append(Annotated[made, subcommand(group)])
  tyro.cli(functools.reduce(operator.or_, whole), prog="neurojax", args=arguments, config=_CONFIG)


def description(text: str, width: int) -> str:
  """A docstring for a terminal: paragraphs wrapped once, each example on lines of its own."""
  blocks: list[str] = []
  for paragraph in textwrap.dedent(f"  {text}".strip("\n")).strip().split("\n\n"):
    lines = [line.strip() for line in paragraph.splitlines()]
    if lines[0].startswith("Example:"):
      blocks.append("\n".join(_example(line, width) for line in lines))
    else:
      blocks.append(textwrap.fill(" ".join(lines), width, break_on_hyphens=False))
  return "\n\n".join(blocks)


def _example(line: str, width: int) -> str:
  """A command that a shell takes as it is printed: broken before options only."""
  rows = [""]
  for part in line.replace(" --", "\n--").split("\n"):
    if rows[-1] and len(rows[-1]) + len(part) + 3 > width:
      rows[-1] += " \\"
      rows.append(f"    {part}")
    else:
      rows[-1] += f" {part}" if rows[-1] else part
  return "\n".join(rows)


def _registry() -> ConstructorRegistry:
  """Tyro's rule for dataclasses, changed for reading.

  Required options come first, then those of the class itself, then those of its bases. An
  option's text is one paragraph, whatever the lines of its docstring. Absent and false defaults are
  not printed. Choices are listed in the order of their type, and None is not offered.
  """
  registry, inner = ConstructorRegistry(), False

  @registry.primitive_rule
  def union(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    # tyro lists the choices of a union in the order of a set, which differs from run to run.
    nonlocal inner
    if inner or get_origin(info.type) not in (Union, types.UnionType):
      return None
    inner = True
    try:
      spec = ConstructorRegistry.get_primitive_spec(info)
    finally:
      inner = False
    if not isinstance(spec, PrimitiveConstructorSpec) or spec.choices is None:
      return None
    order = [str(value) for kind in get_args(info.type) for value in get_args(kind)]
    choices = tuple(value for value in order if value in spec.choices)
    return dataclasses.replace(spec, choices=choices) if choices else None

  @registry.struct_rule
  def dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
    nonlocal inner
    if inner or not dataclasses.is_dataclass(info.type):
      return None
    inner = True
    try:
      spec = ConstructorRegistry.get_struct_spec(info)
    finally:
      inner = False
    assert isinstance(spec, StructConstructorSpec)
    required = {
      field.name
      for field in dataclasses.fields(info.type)
      if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    order = {
      name: (place, among)
      for place, base in reversed(list(enumerate(info.type.__mro__)))
      for among, name in enumerate(inspect.get_annotations(base))
    }
    fields = [
      dataclasses.replace(
        field,
        type=_shown(field.type),
        helptext=functools.partial(_one_paragraph, field.helptext),
      )
      for field in sorted(spec.fields, key=lambda it: (it.name not in required, order[it.name]))
    ]
    return dataclasses.replace(spec, fields=tuple(fields))

  return registry


def _one_paragraph(text: str | Callable[[], str | None] | None) -> str | None:
  given = text() if callable(text) else text
  return None if given is None else " ".join(given.split())


def _shown(kind: Any) -> Any:
  """The type with a metavar, where it has none, and without an absent or false default."""
  args = get_args(kind) if get_origin(kind) is Annotated else (kind,)
  named = any(getattr(arg, "metavar", None) for arg in args[1:])
  metavar = None if named else _metavar(args[0])
  if metavar and UseAppendAction in args:
    metavar = metavar.removesuffix(" ...")
  return Annotated[kind, tyro.conf.arg(metavar=metavar, help_behavior_hint=_hint)]


def _metavar(kind: Any) -> str | None:
  if get_origin(kind) in (Union, types.UnionType):
    kinds = [arg for arg in get_args(kind) if arg is not type(None)]
    if len(kinds) != 1:
      return None
    (kind,) = kinds
  if get_origin(kind) is tuple:
    return f"{_metavar(get_args(kind)[0])} ..."
  if get_origin(kind) is Literal:
    return f"{{{','.join(map(str, get_args(kind)))}}}"
  return _METAVARS.get(kind)


def _hint(default: str) -> str:
  return "" if default in ("None", "False", "") else f"(default: {default})"


class _Held(io.StringIO):
  """What tyro prints, while it asks about the true stream how to print it."""

  def __init__(self, stream: Any):
    super().__init__()
    self._stream = stream

  @property
  def encoding(self) -> str:  # pyrefly: ignore
    return self._stream.encoding

  def isatty(self) -> bool:
    return self._stream.isatty()

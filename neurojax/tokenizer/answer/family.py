"""What the answers of a family of models hold besides text, as files of data say it."""

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal

from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

Body = Literal["json", "json_or_xml", "mistral", "pythonic", "gemma"]
ORDER = ("gemma", "lfm2", "mistral", "hermes", "llama3", "think")
"""Families, in the order in which a chat template is compared with them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reasoning:
  """Marks around reasoning.

  Attributes:
    drops: A word that the reasoning may begin with and that is none of it.
  """

  open: str
  close: str
  drops: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calls:
  """How calls of tools are written.

  Attributes:
    open: Mark in front of a call, or of a list of them.
    close: Mark behind it; None if nothing but another call may follow.
    body: How what stands between them is read.
    arguments: Name of the arguments in a JSON body.
    bare: Character with which an answer that is nothing but a call may begin, without a mark.
    quote: Token that stands for a quotation mark.
  """

  open: str
  body: Body
  close: str | None = None
  arguments: str = "arguments"
  bare: str | None = None
  quote: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """One family of models.

  Attributes:
    name: Name of its file.
    template: Texts, one of which its chat templates hold.
    without: Texts that its chat templates do not hold.
    reasoning: None for models that do not think aloud.
    calls: None for models that call no tools.
    id_length: Letters and digits of a call's name.
  """

  name: str
  template: tuple[str, ...]
  without: tuple[str, ...] = ()
  reasoning: Reasoning | None = None
  calls: Calls | None = None
  id_length: int = 24

  def marks(self, *, calls: bool = True) -> tuple[str, ...]:
    """The texts of all marks, of calls too or not."""
    found: list[str | None] = []
    if self.reasoning is not None:
      found += [self.reasoning.open, self.reasoning.close]
    if self.calls is not None and calls:
      found += [self.calls.open, self.calls.close, self.calls.quote]
    return tuple(mark for mark in found if mark is not None)


@functools.cache
def family(name: str) -> Family:
  """The family of a name. Raises: ValueError: there is none."""
  if name not in ORDER:
    raise ValueError(f"there is no family {name!r} of answers: one of {', '.join(ORDER)}")
  folder = resources.files("neurojax.tokenizer.answer") / "families"
  table: Mapping[str, Any] = tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
  return Family(
    name=name,
    template=tuple(table["template"]),
    without=tuple(table.get("without", ())),
    reasoning=Reasoning(**table["reasoning"]) if "reasoning" in table else None,
    calls=Calls(**table["calls"]) if "calls" in table else None,
    id_length=table.get("id_length", 24),
  )


def family_of(spec: TokenizerSpec) -> Family | None:
  """The family that a chat template shows."""
  template = spec.chat_template or ""
  for name in ORDER:
    found = family(name)
    holds = any(text in template for text in found.template)
    if holds and not any(text in template for text in found.without):
      return _without_thought(found, template)
  return None


def _without_thought(found: Family, template: str) -> Family:
  """A model of a family whose template never speaks of reasoning does none."""
  if found.reasoning is None or found.reasoning.close in template or "enable_thinking" in template:
    return found
  return dataclasses.replace(found, reasoning=None)


def mark_ids(spec: TokenizerSpec, marks: tuple[str, ...]) -> dict[int, str]:
  """The marks that are tokens of their own, by id. The other ones have to be found in the text."""
  wanted = set(marks)
  return {
    i: token
    for i, token in enumerate(spec.tokens)
    if token in wanted and spec.types[i] in ("control", "user", "unknown")
  }

"""Writes the reference of docs/python.md from the docstrings of `neurojax.__all__`.

python docs/names.py
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import neurojax
from experiments.readme import DOCS, block

PAGE = DOCS / "python.md"
GROUPS = {
  "Open a model and ask it": (
    "load", "connect", "Model", "AsyncModel", "Completion", "Piece", "Score", "Report", "Progress", "EngineError",
  ),
  "Work on files, fleets and arrays": (
    "inspect", "convert", "size", "plan", "train", "export", "simulate", "quantize", "ternary_matmul",
  ),
  "Describe": (
    "Serving", "Sampling", "ModelConfig", "TrainConfig", "Fleet", "Plan", "Tokenizer", "TernaryArray",
  ),
}  # fmt: skip
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example", "Source")


def reference() -> str:
  """Markdown: every public name under a heading, with its signature and docstring."""
  out = [f"`neurojax.__version__` is {neurojax.__version__!r}.".replace("'", "`"), ""]
  for group, names in GROUPS.items():
    out += [f"### {group}", ""]
    for name in names:
      out += _entry(name)
  return "\n".join(out)


def _entry(name: str) -> list[str]:
  found = getattr(neurojax, name)
  out = [f"#### {name}", ""]
  if not inspect.isclass(found):
    function = found if inspect.isfunction(found) else found._function
    return out + _signature(name, function) + _described(function)
  out += _described(found)
  for method, function in vars(found).items():
    if method.startswith("_") or not isinstance(
      function, property | classmethod | staticmethod | type(reference)
    ):
      continue
    if isinstance(function, property):
      if function.fget.__doc__:
        out += [f"`{name}.{method}`: {_first(function.fget)}", ""]
    elif name == "Model":
      out += [f"##### Model.{method}{_arguments(function)}", "", *_described(function)]
    elif name in ("Fleet", "Plan", "Tokenizer", "ModelConfig"):
      bare = getattr(function, "__func__", function)
      out += [f"`{name}.{method}{_arguments(bare)}`: {_first(bare)}", ""]
  return out


def _signature(name: str, function: Any) -> list[str]:
  lines = []
  for parameter in inspect.signature(function).parameters.values():
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", str(parameter))
    text = re.sub(r"Union\[Literal\[(.*?)\], Literal\[(.*?)\]\]", r"Literal[\2, \1]", text)
    lines.append(f"  {text},")
  kinds = [p.kind for p in inspect.signature(function).parameters.values()]
  if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
    lines.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "  *,")
  return ["```python", f"{name}(", *lines, ")", "```", ""]


def _arguments(function: Any) -> str:
  names = []
  for parameter in list(inspect.signature(function).parameters.values())[1:]:
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in names:
      names.append("*")
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    names.append(stars.get(parameter.kind, "") + parameter.name)
  return f"({', '.join(names)})"


def _first(function: Any) -> str:
  first = inspect.cleandoc(function.__doc__ or "").split("\n\n")[0]
  return " ".join(re.split(rf"\n(?:{'|'.join(SECTIONS)}):", first)[0].split()).split(" Args:")[0]


def _described(thing: Any) -> list[str]:
  """Markdown of a docstring: paragraphs, then each section as a list, a line or code."""
  out: list[str] = []
  text = inspect.cleandoc(thing.__doc__ or "")
  parts = re.split(rf"^({'|'.join(SECTIONS)}):", text, flags=re.MULTILINE)
  out += [parts[0].strip(), ""]
  for section, body in zip(parts[1::2], parts[2::2], strict=True):
    body = body.strip("\n ") if section != "Example" else inspect.cleandoc(body)
    if section == "Example":
      out += ["```python", body.strip(), "```", ""]
    elif re.match(r"[\w, .*]+: ", body) and section in ("Args", "Attributes", "Raises"):
      items = re.split(r"\n(?=  \S)", "  " + body)
      out += [f"{section}:", ""]
      for item in items:
        term, _, meaning = " ".join(item.split()).partition(": ")
        out.append(f"- `{term}`: {meaning}")
      out.append("")
    else:
      out += [f"{section}: {' '.join(body.split())}", ""]
  return out


if __name__ == "__main__":
  block("names", reference(), PAGE)

"""What a model file holds, for programs (`describe`) and for people (`render`)."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from neurojax.config import ModelConfig
from neurojax.files.source import ModelFile


def describe(model: ModelFile, *, sha256: bool = False) -> dict[str, Any]:
  """Plain values (JSON can hold them) about a model file, also about one that cannot be run.

  Args:
    sha256: Whether to hash the file, which reads all of it unless the digest is cached.
  Returns: "path", "file_bytes", "sha256", "format", "version", "architecture", "name", "config"
    (ModelConfig fields or None), "parameters", "types" (a list of type, tensors, parameters,
    bytes, bits_per_weight; largest first), "tokenizer" (or None), "ignored" (parts that text needs
    nothing of), "unsupported" (reasons; empty when the file can be run).
  """
  config = model.interpretation.config
  name = model.metadata.get("general.name")
  return {
    "path": str(model.path),
    "file_bytes": model.file_bytes,
    "sha256": model.sha256() if sha256 else None,
    "format": model.format,
    "version": model.version,
    "architecture": model.interpretation.architecture,
    "name": name if isinstance(name, str) else None,
    "config": None if config is None else _json(config),
    "parameters": sum(math.prod(info.shape) for info in model.tensors.values()),
    "types": _types(model),
    "tokenizer": _tokenizer(model),
    "ignored": list(model.interpretation.ignored),
    "unsupported": model.problems(),
  }


def _json(config: ModelConfig) -> dict[str, Any]:
  """Its fields as JSON has them: lists for tuples."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def render(description: Mapping[str, Any]) -> RenderableType:
  """A page for a terminal from what `describe` returned."""
  facts = Table.grid(padding=(0, 2))
  facts.add_column(style="bold")
  facts.add_column(overflow="fold")

  def fact(label: str, value: object) -> None:
    # Text, not markup: a file's own words may contain brackets.
    if value is not None:
      facts.add_row(label, Text(str(value)))

  fact("file", description["path"])
  fact("size", f"{description['file_bytes']:,} bytes")
  fact("sha256", description["sha256"])
  fact("format", f"{description['format']}, version {description['version']}")
  fact("architecture", description["architecture"])
  fact("name", description["name"])
  fact("parameters", f"{description['parameters']:,}")
  for field, value in (description["config"] or {}).items():
    fact(field, None if value == [] else value)
  for part in description["ignored"]:
    fact("left aside", part)
  tokenizer = description["tokenizer"]
  if tokenizer is not None and "error" not in tokenizer:
    fact("tokenizer", ", ".join(
      f"{key} {value}" for key, value in tokenizer.items()
      if key != "chat_template" and value is not None
    ))  # fmt: skip
    fact("chat template", tokenizer["chat_template"])

  types = Table(title="Stored types")
  for column in ("type", "tensors", "parameters", "bytes", "bits/weight"):
    types.add_column(column, justify="left" if column == "type" else "right")
  for row in description["types"]:
    types.add_row(
      Text(row["type"]), f"{row['tensors']:,}", f"{row['parameters']:,}", f"{row['bytes']:,}",
      f"{row['bits_per_weight']:.4g}",
    )  # fmt: skip

  reasons = description["unsupported"]
  verdict = [Text("It can be run.", style="green")]
  if reasons:
    verdict = [Text("It cannot be run:", style="bold red")]
    verdict += [Text(f"  {reason}") for reason in reasons]
  return Group(facts, types, *verdict)


def _types(model: ModelFile) -> list[dict[str, Any]]:
  rows: dict[str, dict[str, Any]] = {}
  for info in model.tensors.values():
    row = rows.setdefault(info.type, {"type": info.type, "tensors": 0, "parameters": 0, "bytes": 0})
    row["tensors"] += 1
    row["parameters"] += math.prod(info.shape)
    row["bytes"] += info.nbytes
  for row in rows.values():
    row["bits_per_weight"] = 8 * row["bytes"] / row["parameters"]
  return sorted(rows.values(), key=lambda row: -row["bytes"])


def _tokenizer(model: ModelFile) -> dict[str, Any] | None:
  try:
    spec = model.tokenizer
  except (ValueError, NotImplementedError) as error:
    return {"error": str(error)}
  if spec is None:
    return None
  return {
    "kind": spec.kind,
    "pre": spec.pre,
    "size": len(spec.tokens),
    "bos_id": spec.bos_id,
    "eos_id": spec.eos_id,
    "unknown_id": spec.unknown_id,
    "stop_ids": sorted(spec.stop_ids),
    "add_bos": spec.add_bos,
    "add_eos": spec.add_eos,
    "add_space_prefix": spec.add_space_prefix,
    "chat_template": spec.chat_template,
  }

"""Describes a model file: `describe` for programs, `render` for people."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from neurojax import count
from neurojax.config import ModelConfig, Span
from neurojax.files.kept import stored_forms
from neurojax.files.model_file import ModelFile
from neurojax.forms import Scales, Weights, capacity_for
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec


def describe(model: ModelFile, *, sha256: bool = False) -> dict[str, Any]:
  """Describe a model file in plain values that JSON can hold, even a file that cannot be run.

  Args:
    sha256: Whether to hash the file, which reads all of it unless the digest is cached.
  Returns: "path", "file_bytes", "sha256", "format", "version", "architecture", "name", "config"
    (ModelConfig fields or None), "parameters", "types" (a list of type, tensors, parameters,
    bytes, bits_per_weight; largest first), "tokenizer" (or None), "ignored" (parts that text needs
    nothing of), "unsupported" (reasons; empty when the file can be run), "memory" (what running it
    takes, see `_memory`; empty when it cannot be run).
  """
  config = model.interpretation.config
  name = model.metadata.get("general.name")
  reasons = model.problems()
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
    "unsupported": reasons,
    "memory": [] if reasons or config is None else _memory(model, config),
  }


def describe_tokenizer(path: Path) -> dict[str, Any] | None:
  """Describe a tokenizer without a model, like `describe`: a folder, or the tokenizer.json or
  tokenizer.model in one. None where there is no tokenizer.

  Raises: ValueError, NotImplementedError: the tokenizer is not one that is read.
  """
  from neurojax.tokenizer.read.folder import spec_from_folder

  folder = path if path.is_dir() else path.parent
  if not path.is_dir() and path.name not in ("tokenizer.json", "tokenizer.model"):
    return None
  spec = spec_from_folder(folder)
  if spec is None:
    return None
  files = [folder / name for name in ("tokenizer.json", "tokenizer.model")]
  return {
    "path": str(path),
    "file_bytes": sum(file.stat().st_size for file in files if file.is_file()),
    "sha256": None,
    "format": "tokenizer",
    "version": spec.kind,
    "architecture": None,
    "name": None,
    "config": None,
    "parameters": 0,
    "types": [],
    "tokenizer": _spec(spec),
    "ignored": [],
    "unsupported": ["it holds a tokenizer and no model"],
    "memory": [],
  }


_STAGES = (1, 2, 4)


def _memory(model: ModelFile, config: ModelConfig) -> list[dict[str, Any]]:
  """Count the bytes of weights and of one sequence's caches in the largest of equal stages, for each choice
  of weights, number of stages and context. Working memory is not included; `neurojax plan` counts it.
  """
  forms = stored_forms(model)
  kinds: list[tuple[Weights, str]] = [("dense", "float32"), ("dense", "bfloat16")]
  kinds += [("int8", "float32")]
  kinds += [("stored", "float32")] if forms else []
  kinds += [("w2a8", "bfloat16")] if any(isinstance(f, Scales) for f in forms.values()) else []
  contexts = sorted({min(size, config.context_length) for size in (2048, 8192, 32_768)})
  rows = []
  for weights, dtype in kinds:
    for stages in _STAGES:
      if stages > config.num_layers:
        continue
      spans = _equal(config.num_layers, stages)
      held = [
        count.span_bytes(config, span, dtype=dtype, weights=weights, forms=forms) for span in spans
      ]
      for context in contexts:
        capacity = capacity_for(context)
        caches = [
          count.span_cache_bytes(config, span, capacity=capacity, dtype=dtype) for span in spans
        ]
        most = max(range(stages), key=lambda i: held[i] + caches[i])
        rows.append(
          {
            "weights": weights, "dtype": dtype, "stages": stages, "context": context,
            "layers": len(spans[most]), "weight_bytes": held[most], "cache_bytes": caches[most],
          }
        )  # fmt: skip
  return rows


def _equal(num_layers: int, stages: int) -> list[Span]:
  ends = [num_layers * i // stages for i in range(stages + 1)]
  return [
    Span(first_layer=first, last_layer=last - 1, num_layers=num_layers)
    for first, last in itertools.pairwise(ends)
  ]


def _json(config: ModelConfig) -> dict[str, Any]:
  """The fields of a configuration as JSON has them: lists for tuples."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def render(description: Mapping[str, Any]) -> RenderableType:
  """Lay out the result of `describe` for a terminal."""
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

  memory = Table(title="Memory of the largest stage, weights and one sequence's caches")
  for column in ("weights", "stages", "layers", "weights held"):
    memory.add_column(column, justify="left" if column == "weights" else "right")
  contexts = sorted({row["context"] for row in description["memory"]})
  for context in contexts:
    memory.add_column(f"with {context:,} positions", justify="right")
  rows: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
  for row in description["memory"]:
    rows.setdefault((row["weights"], row["dtype"], row["stages"]), []).append(row)
  for (weights, dtype, stages), alike in rows.items():
    memory.add_row(
      f"{weights}, {dtype}", str(stages), str(alike[0]["layers"]),
      f"{alike[0]['weight_bytes'] / 1e6:,.1f} MB",
      *(f"{(row['weight_bytes'] + row['cache_bytes']) / 1e6:,.1f} MB" for row in alike),
    )  # fmt: skip

  reasons = description["unsupported"]
  verdict = [Text("It can be run.", style="green")]
  if reasons:
    verdict = [Text("It cannot be run:", style="bold red")]
    verdict += [Text(f"  {reason}") for reason in reasons]
  tables = [types] if description["types"] else []
  tables += [memory] if rows else []
  return Group(facts, *tables, *verdict)


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
  return None if spec is None else _spec(spec)


def _spec(spec: TokenizerSpec) -> dict[str, Any]:
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

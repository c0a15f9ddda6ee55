"""Canonical parameter names: what every file format maps to, and where NeuroLLM keeps each."""

from collections.abc import Iterator, Mapping
from typing import Any

from neurojax.config import ModelConfig, Span

LAYER: Mapping[str, tuple[str, ...]] = {
  "attn_norm_D": ("layers", "attn_norm", "scale_D"),
  "q_DNH": ("layers", "attention", "q_DNH"),
  "k_DKH": ("layers", "attention", "k_DKH"),
  "v_DKH": ("layers", "attention", "v_DKH"),
  "q_norm_H": ("layers", "attention", "q_norm", "scale_D"),
  "k_norm_H": ("layers", "attention", "k_norm", "scale_D"),
  "attn_sub_norm_NH": ("layers", "attention", "sub_norm", "scale_D"),
  "o_NHD": ("layers", "attention", "o_NHD"),
  "ffn_norm_D": ("layers", "ffn_norm", "scale_D"),
  "gate_DF": ("layers", "ffn", "gate_DF"),
  "up_DF": ("layers", "ffn", "up_DF"),
  "ffn_sub_norm_F": ("layers", "ffn", "sub_norm", "scale_D"),
  "down_FD": ("layers", "ffn", "down_FD"),
}
"""One per layer; stacked over the layers of a span on a leading axis L. See `layer_names`."""

FIRST: Mapping[str, tuple[str, ...]] = {"embedding_VD": ("embedding_VD",)}
LAST: Mapping[str, tuple[str, ...]] = {
  "final_norm_D": ("final_norm", "scale_D"),
  "head_DV": ("head_DV",),
}


def layer_names(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Names and places of the parameters that every layer of this architecture has."""
  absent = set() if config.qk_norm else {"q_norm_H", "k_norm_H"}
  if not config.sub_norm:
    absent |= {"attn_sub_norm_NH", "ffn_sub_norm_F"}
  yield from ((name, path) for name, path in LAYER.items() if name not in absent)


def is_matrix(name: str) -> bool:
  """Whether a canonical name is of a matrix that products multiply by, and of no norm."""
  return "_norm_" not in name


def outer_names(config: ModelConfig, span: Span) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Names and places of the parameters outside the layers that a span holds."""
  if span.is_first or (span.is_last and config.tied_embedding):
    yield from FIRST.items()
  if span.is_last:
    yield from (
      (name, path) for name, path in LAST.items() if name != "head_DV" or not config.tied_embedding
    )


def get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
  """The value at a path of nested mappings."""
  for key in path:
    tree = tree[key]
  return tree


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
  """Set the value at a path of nested dicts, making those that are missing."""
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value

"""Canonical parameter names: every file format maps to them, and NeuroLLM keeps each in one place."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from neurojax.config import LayerKind, ModelConfig, Span

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
  "q_bias_NH": ("layers", "attention", "q_bias_NH"),
  "k_bias_KH": ("layers", "attention", "k_bias_KH"),
  "v_bias_KH": ("layers", "attention", "v_bias_KH"),
  "attn_post_norm_D": ("layers", "attn_post_norm", "scale_D"),
  "ffn_post_norm_D": ("layers", "ffn_post_norm", "scale_D"),
  "layer_scale_1": ("layers", "scale_1"),
  "conv_in_DC": ("layers", "convolution", "in_DC"),
  "conv_kernel_WM": ("layers", "convolution", "kernel_WM"),
  "conv_out_MD": ("layers", "convolution", "out_MD"),
  "router_DE": ("layers", "ffn", "router_DE"),
  "gate_EDF": ("layers", "ffn", "gate_EDF"),
  "up_EDF": ("layers", "ffn", "up_EDF"),
  "down_EFD": ("layers", "ffn", "down_EFD"),
}
"""Parameters of a layer and their places in a model whose layers all have one shape; `stacks` tells the
places in other models. They are stacked over layers of one shape on a leading axis L."""

_CONTRACTED = {"o_NHD": 2, "embedding_VD": -1}

FIRST: Mapping[str, tuple[str, ...]] = {"embedding_VD": ("embedding_VD",)}
LAST: Mapping[str, tuple[str, ...]] = {
  "final_norm_D": ("final_norm", "scale_D"),
  "head_DV": ("head_DV",),
}


@dataclasses.dataclass(frozen=True)
class Stack:
  """Layers of one shape and window, whose parameters and caches are stacked on a leading axis L.

  Attributes:
    name: Attribute of NeuroLLM that holds the stack, the first part of its parameters' places.
    kinds: Layer kinds of the model that have this shape; they differ in rotary positions.
    layers: Layer numbers in the whole model, ascending.
    which: Index in `kinds` for each layer.
  """

  name: str
  kinds: tuple[LayerKind, ...]
  layers: tuple[int, ...]
  which: tuple[int, ...]

  @property
  def kind(self) -> LayerKind:
    """A kind that has the shape of all."""
    return self.kinds[0]


def stacks(config: ModelConfig, span: Span | None = None) -> tuple[Stack, ...]:
  """Lists the stacks of a span of layers (None: all)."""
  span = span or Span.whole(config)
  kinds = config.kinds
  shapes = list(dict.fromkeys(map(_shape, kinds)))
  found = []
  for place, shape in enumerate(shapes):
    alike = [index for index, kind in enumerate(kinds) if _shape(kind) == shape]
    layers = [
      layer
      for layer in range(span.first_layer, span.last_layer + 1)
      if config.kind_index(layer) in alike
    ]
    if layers:
      found.append(
        Stack(
          name="layers" if len(shapes) == 1 else f"layers_{place}",
          kinds=tuple(kinds[index] for index in alike),
          layers=tuple(layers),
          which=tuple(alike.index(config.kind_index(layer)) for layer in layers),
        )
      )
  return tuple(found)


def stack_names(config: ModelConfig, stack: Stack) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Yields names and places of the parameters that every layer of a stack has."""
  is_conv = stack.kind.mixer == "convolution"
  is_there = {
    "q_DNH": not is_conv,
    "k_DKH": not is_conv,
    "v_DKH": not is_conv and not stack.kind.shared_kv,
    "o_NHD": not is_conv,
    "q_bias_NH": not is_conv and config.qkv_bias,
    "k_bias_KH": not is_conv and config.qkv_bias,
    "v_bias_KH": not is_conv and config.qkv_bias and not stack.kind.shared_kv,
    "q_norm_H": not is_conv and config.qk_norm,
    "k_norm_H": not is_conv and config.qk_norm,
    "attn_sub_norm_NH": not is_conv and config.sub_norm,
    "conv_in_DC": is_conv,
    "conv_kernel_WM": is_conv,
    "conv_out_MD": is_conv,
    "attn_post_norm_D": config.post_norm,
    "ffn_post_norm_D": config.post_norm,
    "ffn_sub_norm_F": config.sub_norm,
    "layer_scale_1": config.layer_scale,
  }
  has_experts = config.num_experts > 0
  is_there |= dict.fromkeys(("router_DE", "gate_EDF", "up_EDF", "down_EFD"), has_experts)
  is_there |= dict.fromkeys(("gate_DF", "up_DF", "down_FD"), not has_experts)
  yield from (
    (name, (stack.name, *path[1:])) for name, path in LAYER.items() if is_there.get(name, True)
  )


def layer_names(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Yields names and places of the parameters that every layer has, where all have one shape.

  Raises: NotImplementedError: the layers have several shapes: use `stacks`.
  """
  first, *more = stacks(config)
  if more:
    raise NotImplementedError(
      f"layers of {len(more) + 1} shapes (layer_kinds): this needs a model of one stack of layers"
    )
  return stack_names(config, first)


def is_matrix(name: str) -> bool:
  """Tells whether a parameter is a matrix that products multiply by and that may be held narrow.

  Norms, biases, kernels and scales are not, nor is the small matrix by which a router chooses experts.
  """
  return not any(part in name for part in ("_norm_", "_bias_", "_kernel_", "_scale_", "router_"))


def is_multiplied(attribute: str) -> bool:
  """Tells whether products multiply by a layer's parameter, by the last part of its place in a model.

  These are the matrices, and a router.
  """
  return any(
    path[-1] == attribute for name, path in LAYER.items() if is_matrix(name) or name == "router_DE"
  )


def contracted(name: str) -> int:
  """The axes of a matrix that a product sums over: c > 0: its first c axes, c < 0: its last -c.

  Leading axes L of stacked layers and E of experts do not count.
  """
  return _CONTRACTED.get(name, 1)


def is_expert(name: str) -> bool:
  """Tells whether a parameter of a layer holds a matrix of each expert, on a leading axis E."""
  return name in ("gate_EDF", "up_EDF", "down_EFD")


def _shape(kind: LayerKind) -> tuple[object, ...]:
  # The window counts because caches of layers with a window are shorter.
  return kind.mixer, kind.head_dim, kind.num_kv_heads, kind.shared_kv, kind.sliding_window


def outer_names(config: ModelConfig, span: Span) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Yields names and places of the parameters outside the layers that a span holds."""
  if span.is_first or (span.is_last and config.tied_embedding):
    yield from FIRST.items()
  if span.is_last:
    yield from (
      (name, path) for name, path in LAST.items() if name != "head_DV" or not config.tied_embedding
    )


def get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
  """Gets the value at a path of nested mappings."""
  for key in path:
    tree = tree[key]
  return tree


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
  """Sets the value at a path of nested dicts and makes those that are missing."""
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value

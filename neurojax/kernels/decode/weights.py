"""Holds the weights of a span of layers; matrices that share an input are put together."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from neurojax.kernels.decode.shapes import Shape
from neurojax.weights.ternary import TernaryArray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerWeights:
  """Layers stacked on L, matrices as rows of output channels. Rotary pairs are (i, i + H/2).

  Attributes:
    qkv: [L, (N + 2K) * H, D]: rows of q, then k, then v, heads in order.
    o: [L, D, N * H].
    gate_up: [L, 2F, D]: rows of gate, then up.
    down: [L, D, F].
    attn_norm, ffn_norm: float32 [L, D].
    q_norm, k_norm: float32 [L, H], or None for a family that does not normalise them.
  """

  qkv: TernaryArray
  o: TernaryArray
  gate_up: TernaryArray
  down: TernaryArray
  attn_norm: Any
  ffn_norm: Any
  q_norm: Any
  k_norm: Any
  shape: Shape = field(metadata={"static": True})

  @property
  def num_layers(self) -> int:
    return self.attn_norm.shape[0]


def fuse_rows(*parts: TernaryArray) -> TernaryArray:
  """Put the output channels of all parts, in order, into one matrix.

  Args:
    parts: Matrices of one contracted width, group size, scale dtype and mode; [D, ...] or [L, D, ...].
  Raises: ValueError: the parts differ in one of these.
  """
  first = parts[0]
  for part in parts[1:]:
    for name in ("group_size", "mode"):
      if getattr(part, name) != getattr(first, name):
        raise ValueError(
          f"{name} {getattr(part, name)} and {getattr(first, name)}: matrices that share an input"
          " must be quantised alike"
        )
    if part.contraction.k != first.contraction.k or part.scales.dtype != first.scales.dtype:
      raise ValueError(
        f"matrices of {part.contraction.k} x {part.scales.dtype} and"
        f" {first.contraction.k} x {first.scales.dtype} cannot share an input"
      )
  if first.group_size is None:
    # One scale per tensor becomes one per row and block: the kernels index rows.
    scales = [jnp.broadcast_to(p.scales, (*p.codes.shape[:-1], 1)) for p in parts]
  else:
    scales = [p.scales for p in parts]
  k, n = first.contraction.k, sum(part.contraction.n for part in parts)
  group = first.group_size or -(-k // 64) * 64
  return TernaryArray(
    codes=jnp.concatenate([p.codes for p in parts], axis=-2),
    scales=jnp.concatenate(scales, axis=-2),
    weight_shape=(k, n),
    contracted_axes=1,
    group_size=group,
    mode=first.mode,
  )

"""One token through a span of layers in plain JAX: what the decode kernel computes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from neurojax.kernels.attention import reference as attention
from neurojax.kernels.decode.weights import LayerWeights
from neurojax.kernels.gemm import reference as gemm
from neurojax.weights.ternary import TernaryArray

Cache = tuple[Array, Array]
"""Keys and values [L, P, K, S, H]."""

Attend = Callable[[Array, Cache, Array], tuple[Array, Cache]]
"""(heads of queries, keys and values [M, X], cache, layer) to (attended [M, N*H], cache)."""

Norm = Callable[[Array, Array, float], Array]
"""(rows [..., D], scale [D], epsilon) to the rows normalised."""

Multiply = Callable[..., Array]
"""(rows [M, K], stacked weights, layer, dtype=float32) to the product [M, N] in the weights' mode."""


def run_layer(
  x_MD: Float[Array, "M D"],
  cache: Cache,
  weights: LayerWeights,
  layer: Int[Array, ""],
  *,
  attend: Attend,
  multiply: Multiply,
  dtype: DTypeLike = jnp.float32,
  norm: Norm | None = None,
) -> tuple[Float[Array, "M D"], Cache]:
  """Run M tokens through one layer: attention and FFN, each after a norm and added to its input.

  Args:
    x_MD: The residual stream, float32.
    dtype: The dtype of what passes between the steps of a layer.
    norm: RMSNorm by another implementation than `normalise`.
  """
  norm = norm or normalise
  eps = weights.shape.norm_eps
  qkv_MX = multiply(norm(x_MD, weights.attn_norm[layer], eps), weights.qkv, layer, dtype=dtype)
  attended_MY, cache = attend(qkv_MX, cache, layer)
  x_MD = x_MD + multiply(attended_MY, weights.o, layer)
  both = multiply(norm(x_MD, weights.ffn_norm[layer], eps), weights.gate_up, layer, dtype=dtype)
  gate_MF, up_MF = jnp.split(both.astype(jnp.float32), 2, axis=1)
  hidden_MF = (jax.nn.silu(gate_MF) * up_MF).astype(dtype)
  return x_MD + multiply(hidden_MF, weights.down, layer), cache


def normalise(x: Float[Array, "... D"], scale_D: Array, eps: float) -> Float[Array, "... D"]:
  """RMSNorm over the last axis."""
  x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  return x * scale_D.reshape((1,) * (x.ndim - 1) + (-1,))


def decode(
  x_D: Float[Array, "D"],
  weights: LayerWeights,
  keys: Float[Array, "L P K S H"],
  values: Float[Array, "L P K S H"],
  rotation_B2H: Float[Array, "1 2 H"],
  position: Int[Array, ""],
  *,
  slot: Int[Array, ""] | None = None,
  final_norm: Float[Array, "D"] | None = None,
  head: TernaryArray | None = None,
) -> tuple[Float[Array, "D"], Float[Array, "V"] | None, Array, Array]:
  """Run one token through the layers, see `api.decode`."""
  layers, s = weights, weights.shape

  def multiply(x_MK: Array, w: Any, layer: Any, *, dtype: DTypeLike = jnp.float32) -> Array:
    return gemm.matmul(x_MK, w, layer=layer).astype(dtype)

  def attend(qkv_MX: Array, cache: Cache, layer: Array) -> tuple[Array, Cache]:
    norms = None if layers.q_norm is None else (layers.q_norm[layer], layers.k_norm[layer])
    out_MY, keys, values = attention.decode(
      qkv_MX, *cache, layer, position[None],
      slot_B=None if slot is None else slot[None],
      rotation_B2H=rotation_B2H, norms=norms, norm_eps=s.norm_eps,
    )  # fmt: skip
    return out_MY, (keys, values)

  def step(layer: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
    return run_layer(*carry, layers, layer, attend=attend, multiply=multiply)

  x_1D, (keys, values) = lax.fori_loop(
    0, layers.num_layers, step, (x_D[None].astype(jnp.float32), (keys, values))
  )
  logits_V = None
  if head is not None:
    logits_V = multiply(normalise(x_1D, final_norm, s.norm_eps), head, None)[0]
  return x_1D[0], logits_V, keys, values

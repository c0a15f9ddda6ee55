"""Rotary position embeddings, arXiv:2104.09864, and ways to stretch them over longer contexts."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from neurojax.config import RopeScaling, RopeStyle


def frequencies(
  head_dim: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Float64[np.ndarray, "P"], float]:
  """Returns the radians that each pair of a head turns per position, and a factor of cosine and sine.

  Without scaling pair i turns by base**(-2i/H).
  Source: `RopeScaling` says what each kind does; llama3 is that of Llama 3.1's reference code.
  """
  pair = np.arange(head_dim // 2, dtype=np.float64)
  frequency = base ** (-2 * pair / head_dim)
  if scaling is None:
    return frequency, 1.0
  slowed = frequency / scaling.factor
  match scaling.kind:
    case "linear":
      return slowed, 1.0
    case "factors":
      return slowed / np.array(scaling.factors), 1.0
    case "proportional":
      return np.where(pair < int(scaling.rotated * head_dim // 2), slowed, 0.0), 1.0
    case "llama3":
      turns = _original_length(scaling) * frequency / (2 * math.pi)
      low, high = scaling.low_freq_factor, scaling.high_freq_factor
      kept = np.clip((turns - low) / (high - low), 0, 1)
      return kept * frequency + (1 - kept) * slowed, 1.0
    case "yarn":
      kept = 1 - _yarn_ramp(head_dim, base, scaling)
      attention_factor = scaling.attention_factor
      if attention_factor is None:
        attention_factor = 0.1 * math.log(max(scaling.factor, 1.0)) + 1
      return kept * frequency + (1 - kept) * slowed, attention_factor


def rotate(
  x_BTNH: Float[Array, "B T N H"],
  position_BT: Int[Array, "B T"],
  frequency: Float[Array | np.ndarray, "P"],
  *,
  style: RopeStyle,
  factor: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B T N H"]:
  """Turns pair i of each head by the angle `position * frequency[i]`, in float32.

  Args:
    position_BT: Absolute positions, exact below 2**24.
    frequency: The result of `frequencies`; rounded to float32.
    style: "interleaved" pairs elements (2i, 2i+1), "half" pairs (i, i + H/2).
    factor: Factor of cosine and sine.
  Returns: Turned heads, in the dtype of `x_BTNH`.
  Source: arXiv:2104.09864, section 3.4.2.
  """
  head_dim = x_BTNH.shape[-1]
  frequency = jnp.asarray(frequency, jnp.float32)
  angle = position_BT[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if not isinstance(factor, float) or factor != 1:
    cos, sin = cos * factor, sin * factor
  x = x_BTNH.astype(jnp.float32)
  if style == "interleaved":
    pair = x.reshape(*x.shape[:-1], head_dim // 2, 2)
    a, b = pair[..., 0], pair[..., 1]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
  else:
    a, b = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return turned.astype(x_BTNH.dtype)


def _yarn_ramp(head_dim: int, base: float, scaling: RopeScaling) -> Float64[np.ndarray, "P"]:
  """A number for each pair: 0 where it keeps its frequency, 1 where it is slowed. arXiv:2309.00071, section 3.2."""

  def pair_that_turns(times: float) -> float:
    length = _original_length(scaling)
    return head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))

  first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
  if scaling.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, head_dim - 1)
  # The reference widens an empty line by as much.
  width = last - first or 0.001
  return np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)


def _original_length(scaling: RopeScaling) -> int:
  assert scaling.original_context_length is not None
  return scaling.original_context_length

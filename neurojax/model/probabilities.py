"""Log-probabilities, and the filters that keep the likeliest tokens.

Both sum over the vocabulary, and both come out with the same bits in every program: they sum integers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

OFF = -jnp.inf
"""The logit of a token that is never drawn."""

MOST_TOKENS = (1 << 19) - 1
"""The largest vocabulary over which `Weight` sums without an overflow."""

_DIGIT_BITS = 13
_DIGIT = 1 << _DIGIT_BITS


class Weight(NamedTuple):
  """Numbers in [0, 1] as three digits of 13 bits after the point, held in uint32.

  Their sums over a vocabulary are exact, and so do not depend on the order in which a program adds. A
  sum of weights of which the largest is 1 is too small by at most 2**-39 for each token.
  """

  high: jax.Array
  middle: jax.Array
  low: jax.Array

  @classmethod
  def of(cls, x: jax.Array) -> "Weight":
    digits = []
    for _ in range(3):
      x = x * _DIGIT
      digit = x.astype(jnp.int32)  # signed, because CPUs convert to it at once
      x = x - digit.astype(jnp.float32)
      digits.append(digit.astype(jnp.uint32))
    return cls(*digits)

  def where(self, mask: jax.Array) -> "Weight":
    return Weight(*(jnp.where(mask, digit, 0) for digit in self))

  def sum(self) -> "Weight":
    """The sum over the last axis."""
    zero = jnp.uint32(0)

    # One reduction of three, because three reductions would each compute the numbers anew.
    def add(x: Sequence[jax.Array], y: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
      return tuple(a + b for a, b in zip(x, y, strict=True))

    return Weight(*lax.reduce(tuple(self), (zero, zero, zero), add, (self.high.ndim - 1,)))

  def cumulate(self) -> "Weight":
    """The sums of the first, the first two, ... along the last axis."""
    return Weight(*(lax.cumsum(digit, axis=digit.ndim - 1) for digit in self))

  def value(self) -> jax.Array:
    """The number as float32; larger numbers never give smaller floats."""
    middle = self.middle + (self.low >> _DIGIT_BITS)
    high = self.high + (middle >> _DIGIT_BITS)
    digits = (high, middle & (_DIGIT - 1), self.low & (_DIGIT - 1))
    high, middle, low = (digit.astype(jnp.float32) for digit in digits)
    return (high + (middle + low / _DIGIT) / _DIGIT) / _DIGIT


def logprobs(
  logits: Float[Array, "*rows V"], ids: Int[Array, "*rows K"]
) -> Float[Array, "*rows K"]:
  """The log-probabilities of ids [..., K] under float32 logits [..., V]; NaN if a logit is NaN."""
  high = logits.max(axis=-1, keepdims=True)
  total = Weight.of(jnp.exp(logits - high)).sum().value()[..., None]
  return (jnp.take_along_axis(logits, ids, axis=-1) - high) - jnp.log(total)


def keep(
  logits_RV: Float[Array, "R V"],
  top_k_R: Int[Array, "R"],
  top_p_R: Float[Array, "R"],
  min_logit_R: Float[Array, "R"],
  *,
  sort: bool,
) -> Float[Array, "R V"]:
  """Set all logits to -inf that top-k, top-p or min-p drop.

  Args:
    logits_RV: Logits after the temperature; the highest of each row is 0.
    min_logit_R: Logarithm of min-p.
    sort: Whether to sort, or to halve an interval. The kept sets are the same.
  """
  floor = _floor_by_sort if sort else _floor_by_halves
  # The likeliest logit is 0, so a probability ratio of min_p is a logit of log(min_p).
  floor_R = jnp.maximum(floor(logits_RV, top_k_R, top_p_R), min_logit_R)
  return jnp.where(logits_RV >= floor_R[:, None], logits_RV, OFF)


def _floor_by_sort(logits_RV: jax.Array, top_k_R: jax.Array, top_p_R: jax.Array) -> jax.Array:
  # Integers, because XLA sorts them by radix on GPUs, and ten times as fast as floats on CPUs.
  falling_RV = _floats(~lax.sort(~_ordered(logits_RV), dimension=1))
  floor_R1 = jnp.take_along_axis(falling_RV, top_k_R[:, None] - 1, axis=1)
  weight_RV = Weight.of(jnp.where(falling_RV >= floor_R1, jnp.exp(falling_RV), 0)).cumulate()
  sum_RV = weight_RV.value()
  short_RV = sum_RV < top_p_R[:, None] * sum_RV[:, -1:]
  index_R1 = jnp.sum(short_RV, axis=1, keepdims=True, dtype=jnp.int32)
  nucleus_R1 = jnp.take_along_axis(falling_RV, index_R1, axis=1)
  # top_p = 1 keeps everything, also what is too unlikely to be summed.
  return jnp.where(top_p_R < 1, nucleus_R1[:, 0], floor_R1[:, 0])


def _floor_by_halves(logits_RV: jax.Array, top_k_R: jax.Array, top_p_R: jax.Array) -> jax.Array:
  def many(floor_R: jax.Array) -> jax.Array:
    return jnp.sum(logits_RV >= floor_R[:, None], axis=1, dtype=jnp.int32) >= top_k_R

  floor_R = _highest(logits_RV, many)
  weight_RV = Weight.of(jnp.where(logits_RV >= floor_R[:, None], jnp.exp(logits_RV), 0))
  least_R = top_p_R * weight_RV.sum().value()

  def likely(floor_R: jax.Array) -> jax.Array:
    return weight_RV.where(logits_RV >= floor_R[:, None]).sum().value() >= least_R

  return jnp.where(top_p_R < 1, _highest(logits_RV, likely), floor_R)


def _highest(logits_RV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """The highest floor at which `enough` holds in each row, found without a sort.

  `enough` is true at the lowest logit and turns false once as the floor rises. Floats order like the
  integers of their bits, so 32 halvings of an integer interval find the very logit.
  """
  order_RV = _ordered(logits_RV)

  def halve(_: jax.Array | int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    low_R, high_R = bounds
    middle_R = low_R + (high_R - low_R + 1) // 2
    fine_R = enough(_floats(middle_R))
    return jnp.where(fine_R, middle_R, low_R), jnp.where(fine_R, high_R, middle_R - 1)

  return _floats(lax.fori_loop(0, 32, halve, (order_RV.min(axis=1), order_RV.max(axis=1)))[0])


def _ordered(x: jax.Array) -> jax.Array:
  """Maps float32 to uint32 in the same order: negative numbers have all bits flipped."""
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _floats(order: jax.Array) -> jax.Array:
  bits = jnp.where(order >> 31 == 1, order & jnp.uint32((1 << 31) - 1), ~order)
  return lax.bitcast_convert_type(bits, jnp.float32)

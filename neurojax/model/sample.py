"""Chooses the next token. Every row of a batch is drawn alone: same logits, same seed, same token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from neurojax.config import Sampling

_OFF = -jnp.inf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
  """The `Sampling` of each row as arrays, and the tokens that the row has seen.

  Floats are float32, counts int32; key_B2 is the seed's upper and lower half as uint32.
  answer_count_BV counts the tokens of the answer, prompt_seen_BV marks those of the prompt (bool),
  drawn_B is the number of tokens drawn so far.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  temperature_B: Any
  top_k_B: Any
  top_p_B: Any
  min_p_B: Any
  repetition_B: Any
  presence_B: Any
  frequency_B: Any
  key_B2: Any
  drawn_B: Any
  prompt_seen_BV: Any
  answer_count_BV: Any

  @classmethod
  def new(cls, rows: list[Sampling], vocab_size: int) -> "SamplerState":
    def column(name: str, dtype: type) -> jax.Array:
      return jnp.asarray([getattr(row, name) for row in rows], dtype)

    return cls(
      temperature_B=column("temperature", jnp.float32),
      top_k_B=jnp.asarray([min(row.top_k or vocab_size, vocab_size) for row in rows], jnp.int32),
      top_p_B=column("top_p", jnp.float32),
      min_p_B=column("min_p", jnp.float32),
      repetition_B=column("repetition_penalty", jnp.float32),
      presence_B=column("presence_penalty", jnp.float32),
      frequency_B=column("frequency_penalty", jnp.float32),
      key_B2=jnp.asarray(np.array([divmod(row.seed, 2**32) for row in rows], np.uint32)),
      drawn_B=jnp.zeros(len(rows), jnp.int32),
      prompt_seen_BV=jnp.zeros((len(rows), vocab_size), bool),
      answer_count_BV=jnp.zeros((len(rows), vocab_size), jnp.int32),
    )


def observe(
  state: SamplerState, tokens_BT: Int[Array, "B T"], valid: Int[Array, ""]
) -> SamplerState:
  """Marks the first `valid` of T prompt tokens as seen; the rest is padding."""
  vocab_size = state.prompt_seen_BV.shape[1]
  tokens_BT = jnp.where(jnp.arange(tokens_BT.shape[1])[None] < valid, tokens_BT, vocab_size)
  row_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
  seen_BV = state.prompt_seen_BV.at[row_B1, tokens_BT].set(True, mode="drop")
  return dataclasses.replace(state, prompt_seen_BV=seen_BV)


def sample(
  logits_BV: Float[Array, "B V"], state: SamplerState
) -> tuple[Int[Array, "B"], Float[Array, "B"], SamplerState]:
  """Draws one token per row, by the steps of `Sampling` in their order.

  Returns: token ids, their log-probabilities under the untouched logits, and the state after them.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  penalized_BV = _penalize(logits_BV, state)
  token_B = lax.cond(
    jnp.all(state.temperature_B == 0),
    lambda: _likeliest(penalized_BV),
    lambda: jnp.where(
      state.temperature_B == 0, _likeliest(penalized_BV), _draw(penalized_BV, state)
    ),
  )
  row_B = jnp.arange(token_B.shape[0])
  logprob_B = logits_BV[row_B, token_B] - jax.nn.logsumexp(logits_BV, axis=-1)
  count_BV = state.answer_count_BV.at[row_B, token_B].add(1)
  return (
    token_B,
    logprob_B,
    dataclasses.replace(state, answer_count_BV=count_BV, drawn_B=state.drawn_B + 1),
  )


def score(logits_BTV: Float[Array, "B T V"], target_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
  """The log-probability of each target under the logits at its position."""
  logits_BTV = logits_BTV.astype(jnp.float32)
  chosen_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
  return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def _penalize(logits_BV: jax.Array, state: SamplerState) -> jax.Array:
  count_BV = state.answer_count_BV.astype(jnp.float32)
  answered_BV = state.answer_count_BV > 0
  repetition_B1 = state.repetition_B[:, None]
  repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
  logits_BV = jnp.where(answered_BV | state.prompt_seen_BV, repeated_BV, logits_BV)
  logits_BV = logits_BV - state.frequency_B[:, None] * count_BV
  return logits_BV - state.presence_B[:, None] * answered_BV


def _likeliest(logits_BV: jax.Array) -> jax.Array:
  """Takes the likeliest token, the first of equals; any token if a logit is NaN.

  XLA:CPU goes through `argmax` one logit at a time, but vectorises these two reductions.
  """
  token_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
  top_BV = logits_BV >= logits_BV.max(axis=-1, keepdims=True)
  return jnp.where(top_BV, token_V[None], logits_BV.shape[1] - 1).min(axis=-1)


def _draw(logits_BV: jax.Array, state: SamplerState) -> jax.Array:
  """Applies temperature and filters, and draws by Gumbel-max; rows of temperature 0 mean nothing."""
  temperature_B = jnp.where(state.temperature_B == 0, 1.0, state.temperature_B)
  # Subtracting the maximum first keeps a tiny temperature from overflowing.
  logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature_B[:, None]
  return jax.vmap(_draw_row)(
    logits_BV, state.top_k_B, state.top_p_B, state.min_p_B, state.key_B2, state.drawn_B
  )


def _draw_row(
  logits_V: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
  min_p: jax.Array,
  key_2: jax.Array,
  drawn: jax.Array,
) -> jax.Array:
  logits_V = _at_least(logits_V, lambda floor: jnp.sum(logits_V >= floor) >= top_k)
  prob_V = jax.nn.softmax(logits_V)
  # top_p = 1 keeps everything, also where rounding leaves the sum of probabilities below 1.
  nucleus_V = _at_least(logits_V, lambda floor: jnp.sum(prob_V * (logits_V >= floor)) >= top_p)
  logits_V = jnp.where(top_p < 1, nucleus_V, logits_V)
  # The likeliest logit is 0, so a probability ratio of min_p is a logit of log(min_p).
  logits_V = jnp.where(logits_V >= jnp.log(min_p), logits_V, _OFF)
  key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), drawn)
  noisy_V = logits_V + jax.random.gumbel(key, logits_V.shape, jnp.float32)
  return _likeliest(noisy_V[None])[0]


def _at_least(logits_V: jax.Array, enough) -> jax.Array:
  """Drops all logits below the highest floor at which `enough` holds, found without a sort.

  `enough` is true at -inf and turns false once as the floor rises. Floats order like the integers
  of their bits, so 32 halvings of an integer interval find the very logit.
  """
  order_V = _ordered(logits_V)
  low, high = order_V.min(), order_V.max()

  def halve(_: jax.Array | int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    low, high = bounds
    middle = low + (high - low + 1) // 2
    fine = enough(_floats(middle))
    return jnp.where(fine, middle, low), jnp.where(fine, high, middle - 1)

  low, _ = lax.fori_loop(0, 32, halve, (low, high))
  return jnp.where(order_V >= low, logits_V, _OFF)


def _ordered(x: jax.Array) -> jax.Array:
  """Maps float32 to uint32 in the same order: negative numbers have all bits flipped."""
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _floats(order: jax.Array) -> jax.Array:
  bits = jnp.where(order >> 31 == 1, order & jnp.uint32((1 << 31) - 1), ~order)
  return lax.bitcast_convert_type(bits, jnp.float32)

"""Chooses the next token of each row of a step; every row belongs to a sequence that lives in a slot.

The program has no conditional and no loop whose count XLA does not know, so it runs in the same
program as the step that computes the logits. The host names the kind of sampling that serves all rows.

A row gets the same token and the same bits of its log-probability from every program that serves it,
whatever its kind and its other rows. Sums over the vocabulary are therefore sums of integers
(`probabilities.Weight`), which come out the same in any order; everything else looks at one logit at
a time.
"""

import dataclasses
import math
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from neurojax.config import Sampling
from neurojax.config.sampling import MOST_BIASES, MOST_STOP_IDS
from neurojax.model.probabilities import MOST_TOKENS, OFF, keep, logprobs

Kind = Literal["greedy", "plain", "full"]
"""What a program can do: take the likeliest token; also draw by temperature; also everything else."""

_KINDS: tuple[Kind, ...] = typing.get_args(Kind)


def kind_of(sampling: Sampling) -> Kind:
  """Name the narrowest kind of program that serves a request."""
  if counts_tokens(sampling) or sampling.logit_bias or sampling.min_tokens:
    return "full"
  if sampling.temperature == 0:
    return "greedy"  # filters never drop the likeliest token
  whole = sampling.top_k is None and sampling.top_p == 1 and sampling.min_p == 0
  return "plain" if whole else "full"


def counts_tokens(sampling: Sampling) -> bool:
  """Tell whether the tokens that were drawn before change what is drawn, beside the logits."""
  return bool(
    sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
  )


def widest(kinds: Iterable[Kind]) -> Kind:
  """Name the narrowest kind of program that serves rows of all these kinds."""
  return max(kinds, key=_KINDS.index, default="greedy")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotSettings:
  """The `Sampling` of one sequence as small arrays; in a `SamplerState`, of every slot [P, ...].

  Floats are float32, counts and ids int32. top_k is at most the vocabulary's size; min_logit is the
  logarithm of min_p; key_2 is the seed's upper and lower half as uint32. Ids that fill up a table are
  the vocabulary's size.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  temperature: Any
  top_k: Any
  top_p: Any
  min_logit: Any
  repetition: Any
  presence: Any
  frequency: Any
  min_tokens: Any
  key_2: Any
  bias_ids_M: Any
  bias_values_M: Any
  stop_ids_S: Any


def settings_of(sampling: Sampling, stop_ids: Sequence[int], vocab_size: int) -> SlotSettings:
  """Write settings as the numpy arrays that `open_slot` takes.

  Args:
    stop_ids: Tokens that are not drawn before `min_tokens` others.
  Raises: ValueError: a stop id or a token of `logit_bias` that the vocabulary does not have, or more
    than MOST_STOP_IDS stop ids.
  """
  stop_ids = sorted(set(stop_ids))
  if len(stop_ids) > MOST_STOP_IDS:
    raise ValueError(f"{len(stop_ids)} stop ids: give at most {MOST_STOP_IDS}")
  for what, ids in (("stop id", stop_ids), ("logit_bias", [id for id, _ in sampling.logit_bias])):
    for id in ids:
      if not 0 <= id < vocab_size:
        raise ValueError(f"{what} {id}: ids of this model go from 0 to {vocab_size - 1}")
  bias_ids_M = np.full(MOST_BIASES, vocab_size, np.int32)
  bias_values_M = np.zeros(MOST_BIASES, np.float32)
  for index, (id, value) in enumerate(sampling.logit_bias):
    bias_ids_M[index], bias_values_M[index] = id, value
  stop_ids_S = np.full(MOST_STOP_IDS, vocab_size, np.int32)
  stop_ids_S[: len(stop_ids)] = stop_ids
  return SlotSettings(
    temperature=np.array(sampling.temperature, np.float32),
    top_k=np.array(min(sampling.top_k or vocab_size, vocab_size), np.int32),
    top_p=np.array(sampling.top_p, np.float32),
    min_logit=np.array(math.log(sampling.min_p) if sampling.min_p else -math.inf, np.float32),
    repetition=np.array(sampling.repetition_penalty, np.float32),
    presence=np.array(sampling.presence_penalty, np.float32),
    frequency=np.array(sampling.frequency_penalty, np.float32),
    min_tokens=np.array(sampling.min_tokens, np.int32),
    key_2=np.array(divmod(sampling.seed, 2**32), np.uint32),
    bias_ids_M=bias_ids_M,
    bias_values_M=bias_values_M,
    stop_ids_S=stop_ids_S,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
  """The settings of P slots, and what the sequences in them have seen and drawn.

  Attributes:
    settings: Settings of each slot.
    drawn_P: int32, the tokens drawn so far.
    prompt_seen_PV: bool, the tokens that the prompt holds. It and `answer_count_PV` are read and
      written for penalties only, by programs of kind "full".
    answer_count_PV: int32, how often the answer holds each token.
  """

  settings: SlotSettings
  drawn_P: Any
  prompt_seen_PV: Any
  answer_count_PV: Any

  @classmethod
  def new(cls, slots: int, vocab_size: int) -> "SamplerState":
    """Make the state of free slots. Raises: ValueError: a vocabulary whose sums would overflow."""
    if vocab_size > MOST_TOKENS:
      raise ValueError(f"vocab_size = {vocab_size}: the sampler can sum over at most {MOST_TOKENS}")

    def repeat(value: np.ndarray) -> jax.Array:
      return jnp.tile(jnp.asarray(value)[None], (slots,) + (1,) * np.ndim(value))

    return cls(
      settings=jax.tree.map(repeat, settings_of(Sampling(), (), vocab_size)),
      drawn_P=jnp.zeros(slots, jnp.int32),
      prompt_seen_PV=jnp.zeros((slots, vocab_size), bool),
      answer_count_PV=jnp.zeros((slots, vocab_size), jnp.int32),
    )


def open_slot(
  state: SamplerState, slot: Int[Array, ""] | int, settings: SlotSettings
) -> SamplerState:
  """Begin a sequence in a slot: its settings, nothing seen, nothing drawn."""
  return SamplerState(
    settings=jax.tree.map(lambda table, value: table.at[slot].set(value), state.settings, settings),
    drawn_P=state.drawn_P.at[slot].set(0),
    prompt_seen_PV=state.prompt_seen_PV.at[slot].set(False),
    answer_count_PV=state.answer_count_PV.at[slot].set(0),
  )


def observe(
  state: SamplerState,
  slot: Int[Array, ""] | int,
  tokens_T: Int[Array, "T"],
  count: Int[Array, ""] | int,
) -> SamplerState:
  """Mark the first `count` of T prompt tokens as seen in a slot; the rest is padding.

  Only sequences of kind "full" need it.
  """
  vocab_size = state.prompt_seen_PV.shape[1]
  tokens_T = jnp.where(jnp.arange(tokens_T.shape[0]) < count, tokens_T, vocab_size)
  seen_PV = state.prompt_seen_PV.at[slot, tokens_T].set(True, mode="drop")
  return dataclasses.replace(state, prompt_seen_PV=seen_PV)


class Drawn(NamedTuple):
  """The tokens of R rows.

  Attributes:
    token_R: int32 ids.
    logprob_R: float32, their log-probabilities under the untouched logits; NaN where no token could be
      drawn, because the logits are NaN or because everything was banned.
    tops: The `top` likeliest tokens in falling order under the untouched logits, ties by id: int32 ids
      [R, top] and float32 log-probabilities [R, top]; None for top = 0.
  """

  token_R: jax.Array
  logprob_R: jax.Array
  tops: tuple[jax.Array, jax.Array] | None


def sample(
  logits_RV: Float[Array, "R V"],
  state: SamplerState,
  slot_R: Int[Array, "R"],
  live_R: Bool[Array, "R"],
  *,
  kind: Kind,
  sort: bool,
  top: int = 0,
  allowed_RW: UInt32[Array, "R W"] | None = None,
  forced_R: Int[Array, "R"] | None = None,
  after_R: Int[Array, "R"] | None = None,
) -> tuple[Drawn, SamplerState]:
  """Draw one token per row, by the steps of `Sampling` in their order.

  Args:
    slot_R: Slot of each row; live rows have different ones.
    live_R: Whether the row is one. Others get tokens that mean nothing and change no slot, whichever
      they name.
    kind: Serves every live row: `widest` of their kinds.
    sort: Whether top-k and top-p sort the logits, meant for GPUs, or halve an interval, meant for CPUs.
      The tokens are the same. On two cores of a shared CPU, one row of 49,152 logits took 1.8 ms against
      0.5, one of 151,936 took 6.2 ms against 2.0.
    top: Likeliest tokens to name beside each drawn one.
    allowed_RW: A bit for each token that may be drawn, the lowest first; W = ceil(V / 32).
    forced_R: Tokens to take and to count in place of drawn ones; -1 draws.
    after_R: Number of tokens of the slot that other rows of this step draw before this one. Their count
      is not known to penalties. None: 0.
  """
  logits_RV = logits_RV.astype(jnp.float32)
  own, drawn_R = jax.tree.map(lambda table: _rows(table, slot_R), (state.settings, state.drawn_P))
  if after_R is not None:
    drawn_R = drawn_R + after_R
  weighed_RV = logits_RV
  if kind == "full":
    seen_RV, count_RV = _rows(state.prompt_seen_PV, slot_R), _rows(state.answer_count_PV, slot_R)
    weighed_RV = _penalize(logits_RV, own, seen_RV, count_RV)
  if allowed_RW is not None:
    weighed_RV = jnp.where(_unpack(allowed_RW, logits_RV.shape[1]), weighed_RV, OFF)
  if kind == "full":
    weighed_RV = _await_min_tokens(weighed_RV, own, drawn_R)
  token_R = _choose(weighed_RV, own, drawn_R, kind, sort)
  none_R = weighed_RV.max(axis=-1) == OFF
  if forced_R is not None:
    token_R = jnp.where(forced_R >= 0, forced_R, token_R)
    none_R = none_R & (forced_R < 0)
  ids_RK = token_R[:, None]
  if top:
    ids_RK = jnp.concatenate([ids_RK, lax.top_k(logits_RV, top)[1]], axis=1)
  logprob_RK = logprobs(logits_RV, ids_RK)
  logprob_R = jnp.where(none_R, jnp.nan, logprob_RK[:, 0])
  drawn = Drawn(token_R, logprob_R, (ids_RK[:, 1:], logprob_RK[:, 1:]) if top else None)
  return drawn, count(state, slot_R, token_R, live_R, kind=kind)


def tops(logits_MV: Float[Array, "M V"], k: int) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
  """Find the k likeliest tokens in falling order, ties by id, and their log-probabilities."""
  logits_MV = logits_MV.astype(jnp.float32)
  ids_MK = lax.top_k(logits_MV, k)[1]
  return ids_MK, logprobs(logits_MV, ids_MK)


def score(logits_BTV: Float[Array, "B T V"], target_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
  """The log-probability of each target under the logits at its position.

  Its bits are those that `sample` gives for the same logits. It has no gradient.
  """
  return logprobs(logits_BTV.astype(jnp.float32), target_BT[..., None])[..., 0]


def count(
  state: SamplerState,
  slot_R: Int[Array, "R"],
  token_R: Int[Array, "R"],
  live_R: Bool[Array, "R"],
  *,
  kind: Kind,
) -> SamplerState:
  """Count one token as drawn in the slot of each live row, as `sample` does with the tokens it draws."""
  slot_R = jnp.where(live_R, slot_R, state.drawn_P.shape[0])  # beyond the last: dropped
  state = dataclasses.replace(state, drawn_P=state.drawn_P.at[slot_R].add(1, mode="drop"))
  if kind != "full":
    return state
  count_PV = state.answer_count_PV.at[slot_R, token_R].add(1, mode="drop")
  return dataclasses.replace(state, answer_count_PV=count_PV)


def _rows(table: jax.Array, slot_R: jax.Array) -> jax.Array:
  return table.at[slot_R].get(mode="clip")


def _penalize(
  logits_RV: jax.Array, own: SlotSettings, seen_RV: jax.Array, count_RV: jax.Array
) -> jax.Array:
  """Applies the penalties and logit_bias."""
  answered_RV = count_RV > 0
  repetition_R1 = own.repetition[:, None]
  repeated_RV = jnp.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
  logits_RV = jnp.where(answered_RV | seen_RV, repeated_RV, logits_RV)
  # A choice stands between product and difference, because a compiler may fuse the two, or not.
  frequent_RV = jnp.where(answered_RV, own.frequency[:, None] * count_RV.astype(jnp.float32), 0)
  logits_RV = logits_RV - frequent_RV - jnp.where(answered_RV, own.presence[:, None], 0)
  row_R1 = jnp.arange(logits_RV.shape[0])[:, None]
  return logits_RV.at[row_R1, own.bias_ids_M].add(own.bias_values_M, mode="drop")


def _await_min_tokens(logits_RV: jax.Array, own: SlotSettings, drawn_R: jax.Array) -> jax.Array:
  """Bans the stop ids of rows that have drawn too few tokens, unless only they may be drawn."""
  early_R1 = (drawn_R < own.min_tokens)[:, None]
  ids_RS = jnp.where(early_R1, own.stop_ids_S, logits_RV.shape[1])
  row_R1 = jnp.arange(logits_RV.shape[0])[:, None]
  banned_RV = logits_RV.at[row_R1, ids_RS].set(OFF, mode="drop")
  left_R1 = banned_RV.max(axis=-1, keepdims=True) > OFF
  return jnp.where(left_R1, banned_RV, logits_RV)


def _unpack(bits_RW: jax.Array, number: int) -> jax.Array:
  shift_1132 = jnp.arange(32, dtype=jnp.uint32)[None, None]
  bits_RW32 = (bits_RW[:, :, None] >> shift_1132) & 1
  return bits_RW32.reshape(bits_RW.shape[0], -1)[:, :number].astype(bool)


def _choose(
  logits_RV: jax.Array, own: SlotSettings, drawn_R: jax.Array, kind: Kind, sort: bool
) -> jax.Array:
  likeliest_R = _likeliest(logits_RV)
  if kind == "greedy":
    return likeliest_R
  temperature_R = jnp.where(own.temperature == 0, 1.0, own.temperature)
  # Subtracting the maximum first keeps a tiny temperature from overflowing.
  logits_RV = (logits_RV - logits_RV.max(axis=-1, keepdims=True)) / temperature_R[:, None]
  if kind == "full":
    logits_RV = keep(logits_RV, own.top_k, own.top_p, own.min_logit, sort=sort)
  noise_RV = jax.vmap(_noise, in_axes=(0, 0, None))(own.key_2, drawn_R, logits_RV.shape[1])
  return jnp.where(own.temperature == 0, likeliest_R, _likeliest(logits_RV + noise_RV))


def _noise(key_2: jax.Array, drawn: jax.Array, number: int) -> jax.Array:
  """The Gumbel noise of one draw, which the seed and the index of the token determine."""
  key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), drawn)
  return jax.random.gumbel(key, (number,), jnp.float32)


def _likeliest(logits_RV: jax.Array) -> jax.Array:
  """Takes the likeliest token, the first of equals; any token if a logit is NaN.

  XLA:CPU goes through `argmax` one logit at a time, but vectorises these two reductions.
  """
  token_V = jnp.arange(logits_RV.shape[1], dtype=jnp.int32)
  top_RV = logits_RV >= logits_RV.max(axis=-1, keepdims=True)
  return jnp.where(top_RV, token_V[None], logits_RV.shape[1] - 1).min(axis=-1)

"""The programs of a stage that compute: rows of prompts, steps of many rows, scores. All are pure functions."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from neurojax.model import sample as sampling
from neurojax.model.cache import Rows
from neurojax.model.sample import Drawn, Kind
from neurojax.stage.programs import Programs
from neurojax.stage.state import StageState

LOOP = 8
"""Tokens that one call of a program draws of each row at most."""

PLAN = 4 + LOOP + 1
"""Integers that tell a program of one row, see `CompiledStage.decode`."""

DRAFT_PLAN = 6
"""Integers that tell `StepPrograms.verify` of one row, see `CompiledStage.verify`."""

NOT_DRAWN = -2
"""Stands in a plan for a token that nothing draws."""

SCORED = 64
"""Positions whose logits are in memory at the same time when a prompt is scored."""


@dataclasses.dataclass(frozen=True)
class StepPrograms:
  """What `stage.compile` compiles.

  Attributes:
    programs: Compute layers and logits.
    is_first: Whether the span is the first: its inputs are tokens.
    is_static: Whether every loop over tokens has a count that XLA knows. A GPU runs any other by looking
      at the device after every round.
  """

  programs: Programs
  is_first: bool
  is_static: bool

  def prompt(
    self,
    params: Any,
    state: StageState,
    tokens_T: Int[Array, "T"],
    where_3: Int[Array, "3"],
    hidden_TD: Float[Array, "T D"] | None = None,
  ) -> tuple[StageState, Array, Array]:
    """Run a row of a prompt.

    Args:
      where_3: Slot, start, and the number of tokens that are no padding.
    Returns: The state, activations of all tokens, and those of the last one.
    """
    slot, start, count = where_3
    rows = Rows(start[None], count[None], slot[None])
    inputs = tokens_T if hidden_TD is None else hidden_TD
    x_BTD, cache = self.programs.forward(params, inputs[None], state.cache, rows)
    sampler = state.sampler
    if sampler is not None:
      sampler = sampling.observe(sampler, slot, tokens_T, count)
    x_1D = lax.dynamic_slice_in_dim(x_BTD[0], count - 1, 1)
    return dataclasses.replace(state, cache=cache, sampler=sampler), x_BTD[0], x_1D

  def draw(
    self,
    params: Any,
    state: StageState,
    x_1D: Float[Array, "1 D"],
    slot: Int[Array, ""],
    allowed_1W: UInt[Array, "1 W"] | None = None,
    *,
    kind: Kind,
    top: int,
  ) -> tuple[StageState, Array]:
    """Draw the token after activations. Returns: The state, and what was drawn (`_packed`), for one row."""
    logits_1V = self.programs.logits(params, x_1D[:, None])[:, 0]
    drawn, sampler = sampling.sample(
      logits_1V, state.sampler, slot[None], jnp.ones(1, bool),
      kind=kind, top=top, allowed_RW=allowed_1W, sort=self.is_static,
    )  # fmt: skip
    last_P = state.last_P.at[slot].set(drawn.token_R[0])
    return dataclasses.replace(state, sampler=sampler, last_P=last_P), _packed(drawn)[None]

  def decode(
    self,
    params: Any,
    state: StageState,
    plan_XR: Int[Array, "X R"],
    *extra: Array,
    kind: Kind,
    top: int,
    rounds: int,
    masked: bool,
  ) -> tuple[StageState, Array]:
    """Run a step of many rows, see `CompiledStage.decode`; `extra` are activations, then masks.

    Args:
      rounds: Tokens of each row, where that is static.
    """
    slot_R, start_R, count_R, fresh_R = plan_XR[:4]
    given_NR = plan_XR[4:]
    allowed_RW = extra[-1] if masked else None
    hidden_RD = None if self.is_first else extra[0]
    token_R = jnp.where(given_NR[0] >= 0, given_NR[0], state.last_P[slot_R])
    sampler = sampling.count(
      state.sampler, slot_R, token_R, (fresh_R > 0) & (count_R > 0), kind=kind
    )

    def one(i: Array | int, carry: tuple[Any, ...]) -> tuple[Any, ...]:
      cache, sampler, token_R, out_NRX = carry
      live_R = count_R > i
      rows = Rows(start_R + i, live_R.astype(jnp.int32), slot_R)
      inputs = token_R if hidden_RD is None else hidden_RD
      logits_RV, cache = self.programs.step(params, inputs, cache, rows)
      forced_R = given_NR[i + 1]
      drawing_R = live_R & (forced_R != NOT_DRAWN)
      drawn, sampler = sampling.sample(
        logits_RV, sampler, slot_R, drawing_R,
        kind=kind, top=top, allowed_RW=allowed_RW, forced_R=forced_R, sort=self.is_static,
      )  # fmt: skip
      token_R = jnp.where(live_R, drawn.token_R, token_R)
      out_NRX = lax.dynamic_update_index_in_dim(out_NRX, _packed(drawn), i, 0)
      return cache, sampler, token_R, out_NRX

    out_NRX = jnp.zeros((LOOP, plan_XR.shape[1], 2 + 2 * top), jnp.int32)
    carry = state.cache, sampler, token_R, out_NRX
    count = rounds if self.is_static else jnp.max(count_R)
    cache, sampler, token_R, out_NRX = lax.fori_loop(0, count, one, carry)
    # Rows that are padding may name any slot: they are sent past the end.
    to_R = jnp.where(count_R > 0, slot_R, state.last_P.shape[0])
    last_P = state.last_P.at[to_R].set(token_R, mode="drop")
    return dataclasses.replace(state, cache=cache, sampler=sampler, last_P=last_P), out_NRX

  def verify(
    self,
    params: Any,
    state: StageState,
    plan_XR: Int[Array, "X R"],
    *extra: Array,
    kind: Kind,
    top: int,
    masked: bool,
  ) -> tuple[StageState, Array]:
    """Draw after tokens and after drafts of what follows them, see `CompiledStage.verify`.

    The rows of a sequence lie side by side. As every layer writes the keys of all rows before any row
    reads, each row sees what it would see alone after those before it.
    """
    slot_R, start_R, count_R, after_R, given_R, draft_R = plan_XR
    allowed_RW = extra[-1] if masked else None
    token_R = jnp.where(given_R >= 0, given_R, state.last_P[slot_R])
    inputs = token_R if self.is_first else extra[0]
    rows = Rows(start_R, count_R, slot_R)
    logits_RV, cache = self.programs.step(params, inputs, state.cache, rows)
    drawn, _ = sampling.sample(
      logits_RV, state.sampler, slot_R, jnp.zeros_like(slot_R, bool),
      kind=kind, top=top, allowed_RW=allowed_RW, after_R=after_R, sort=self.is_static,
    )  # fmt: skip
    stands_R = drawn.token_R == draft_R
    # Whether row q of the same sequence comes before row r.
    before_RQ = (slot_R[:, None] == slot_R[None]) & (after_R[:, None] > after_R[None])
    wrong_R = jnp.any(before_RQ & (~stands_R & (count_R > 0))[None], axis=1)
    taken_R = (count_R > 0) & ~wrong_R
    sampler = sampling.count(state.sampler, slot_R, drawn.token_R, taken_R, kind=kind)
    to_R = jnp.where(taken_R & ~stands_R, slot_R, state.last_P.shape[0])
    last_P = state.last_P.at[to_R].set(drawn.token_R, mode="drop")
    return dataclasses.replace(state, cache=cache, sampler=sampler, last_P=last_P), _packed(drawn)

  def pass_on(
    self,
    params: Any,
    state: StageState,
    plan_XR: Int[Array, "X R"],
    hidden_RD: Float[Array, "R D"] | None = None,
  ) -> tuple[StageState, Float[Array, "R D"]]:
    """Run one token of many rows, whose activations go to the next stage."""
    rows = Rows(plan_XR[1], plan_XR[2], plan_XR[0])
    inputs = plan_XR[4] if hidden_RD is None else hidden_RD
    x_R1D, cache = self.programs.forward(params, inputs[:, None], state.cache, rows)
    return dataclasses.replace(state, cache=cache), x_R1D[:, 0]

  def score(
    self, params: Any, x_TD: Float[Array, "T D"], target_T: Int[Array, "T"], *, top: int
  ) -> Int[Array, "T X"]:
    """Compute the log-probabilities of targets, SCORED positions at a time."""
    block = min(SCORED, x_TD.shape[0])

    def one(given: tuple[Array, Array]) -> Array:
      x_MD, target_M = given
      logits_MV = self.programs.logits(params, x_MD[None])[0]
      score_M = sampling.score(logits_MV[None], target_M[None])[0]
      columns = [_bits(score_M)[:, None]]
      if top:
        ids_MX, logprob_MX = sampling.tops(logits_MV, top)
        columns += [ids_MX, _bits(logprob_MX)]
      return jnp.concatenate(columns, axis=1)

    length, width = x_TD.shape
    padded = -(-length // block) * block
    x_TD = jnp.pad(x_TD, ((0, padded - length), (0, 0)))
    target_T = jnp.pad(target_T, (0, padded - length))
    out = lax.map(one, (x_TD.reshape(-1, block, width), target_T.reshape(-1, block)))
    return out.reshape(padded, -1)[:length]


def _packed(drawn: Drawn) -> Int[Array, "R X"]:
  """What was drawn, as integers that one transfer brings to the host."""
  columns = [drawn.token_R[:, None], _bits(drawn.logprob_R)[:, None]]
  if drawn.tops is not None:
    ids_RX, logprob_RX = drawn.tops
    columns += [ids_RX, _bits(logprob_RX)]
  return jnp.concatenate(columns, axis=1)


def _bits(x: Array) -> Array:
  return lax.bitcast_convert_type(x, jnp.int32)

"""The sampler against a plain float64 one, by sorting, and by counting draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.config import Sampling
from neurojax.model import sample as sampler
from neurojax.model.sample import SamplerState, observe, score

V = 50
# As engines run it; without, the branches of its `cond` are compiled at every call.
sample = jax.jit(sampler.sample)


def kept(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
  """Which tokens may be drawn, by sorting, in float64."""
  logits = logits.astype(np.float64) / (sampling.temperature or 1)
  ok = np.ones(len(logits), bool)
  if sampling.top_k:
    ok &= logits >= np.sort(logits)[::-1][min(sampling.top_k, len(logits)) - 1]
  if sampling.top_p < 1:
    prob = np.where(ok, np.exp(logits - logits.max()), 0)
    prob /= prob.sum()
    order = np.argsort(-prob, kind="stable")
    number = np.searchsorted(np.cumsum(prob[order]), sampling.top_p - 1e-9) + 1
    nucleus = np.zeros_like(ok)
    nucleus[order[:number]] = True
    ok &= nucleus
  return ok & (np.exp(logits - logits.max()) >= sampling.min_p)


def draws(logits: np.ndarray, sampling: Sampling, number: int) -> np.ndarray:
  rows = [dataclasses.replace(sampling, seed=seed) for seed in range(number)]
  state = SamplerState.new(rows, len(logits))
  tokens, _, _ = sample(jnp.tile(jnp.asarray(logits)[None], (number, 1)), state)
  return np.asarray(tokens)


@pytest.mark.parametrize(
  "sampling",
  [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.5, top_p=0.6),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.2, top_k=20, top_p=0.8, min_p=0.05),
  ],
  ids=str,
)
def test_draws_follow_the_filtered_distribution(sampling: Sampling):
  logits = np.random.default_rng(0).standard_normal(V).astype(np.float32) * 2
  ok = kept(logits, sampling)
  weight = np.where(
    ok, np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature), 0
  )
  prob = weight / weight.sum()
  number = 4000
  count = np.bincount(draws(logits, sampling, number), minlength=V)
  assert count[~ok].sum() == 0, "a token that was filtered out was drawn"
  # Five standard deviations: about one false alarm in a million per token, with fixed seeds never.
  assert (np.abs(count - number * prob) <= 5 * np.sqrt(number * prob * (1 - prob)) + 1).all()


@given(
  logits=st.sampled_from([2, 3, 5, 8, 12]).flatmap(
    lambda width: st.lists(
      st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 2.0, 7.0]), min_size=width, max_size=width
    )
  ),
  top_k=st.one_of(st.none(), st.integers(1, 15)),
  top_p=st.sampled_from([0.1, 0.55, 0.9, 1.0]),
  min_p=st.sampled_from([0.0, 0.3, 1.0]),
  seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=100, deadline=None)
def test_ties_and_edges_never_leave_the_kept_set(logits, top_k, top_p, min_p, seed):
  """With ties at the cut the kept set is larger than a sort's: whatever equals a kept logit is kept."""
  sampling = Sampling(temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
  values = np.array(logits, np.float32)
  token, _, _ = sample(jnp.asarray(values)[None], SamplerState.new([sampling], len(values)))
  allowed = set(values[kept(values, sampling)])
  assert values[int(token[0])] in allowed


def test_greedy_takes_the_lowest_of_equal_ids_whatever_the_seed():
  logits = jnp.asarray([[1.0, 5.0, 5.0, 0.0]])
  for seed in range(5):
    token, logprob, _ = sample(logits, SamplerState.new([Sampling(seed=seed)], 4))
    assert int(token[0]) == 1
  assert float(logprob[0]) == pytest.approx(5 - np.log(np.exp([1.0, 5, 5, 0]).sum()), rel=1e-6)


def test_a_row_does_not_depend_on_the_rest_of_its_batch():
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.standard_normal((6, V)), jnp.float32)
  rows = [
    Sampling(temperature=0.0, repetition_penalty=1.3),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.8, top_p=0.9, seed=2**63 + 5),
    Sampling(temperature=2.0, top_k=3, seed=3),
    Sampling(temperature=0.0),
    Sampling(temperature=0.5, min_p=0.1, presence_penalty=1.0, seed=9),
  ]
  state = SamplerState.new(rows, V)
  together = []
  for _ in range(4):
    tokens, _, state = sample(logits, state)
    together.append(np.asarray(tokens).tolist())
  for index, row in enumerate(rows):
    alone_state = SamplerState.new([row], V)
    for step in range(4):
      token, _, alone_state = sample(logits[index : index + 1], alone_state)
      assert int(token[0]) == together[step][index]


def test_the_seed_uses_all_its_bits_and_every_draw_is_new():
  logits = np.zeros(1000, np.float32)
  seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
  states = SamplerState.new([Sampling(temperature=1.0, seed=s) for s in seeds], 1000)
  tokens, _, states = sample(jnp.tile(jnp.asarray(logits)[None], (len(seeds), 1)), states)
  assert len(set(np.asarray(tokens).tolist())) == len(seeds)
  again, _, _ = sample(jnp.tile(jnp.asarray(logits)[None], (len(seeds), 1)), states)
  assert (tokens != again).all()


def test_penalties_by_hand():
  logits = jnp.asarray([[2.0, -2.0, 1.0, 0.5]])
  sampling = Sampling(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
  state = SamplerState.new([sampling], 4)
  # Of five places, two are padding: token 3 is not seen.
  state = observe(state, jnp.array([[1, 0, 1, 3, 3]]), jnp.int32(3))
  assert state.prompt_seen_BV.tolist() == [[True, True, False, False]]
  # Penalized: 2/2 = 1, -2*2 = -4, 1, 0.5: the tie goes to token 0.
  token, logprob, state = sample(logits, state)
  assert int(token[0]) == 0
  assert float(logprob[0]) == pytest.approx(2 - np.log(np.exp([2, -2, 1, 0.5]).sum()), rel=1e-6), (
    "untouched logits"
  )
  # Token 0 pays presence and frequency now: 1 - 0.25 - 0.5; token 2 leads with 1.
  token, _, state = sample(logits, state)
  assert int(token[0]) == 2
  # Token 2: 1/2 - 0.75 < 0; token 3 leads with 0.5, token 0 has 0.25.
  token, _, state = sample(logits, state)
  assert int(token[0]) == 3
  assert state.answer_count_BV.tolist() == [[1, 0, 1, 1]] and state.drawn_B.tolist() == [3]


def test_a_tiny_temperature_is_nearly_greedy_and_never_nan():
  logits = np.array([1e4, 1e4 - 1, -1e4, 0], np.float32)
  assert set(draws(logits, Sampling(temperature=1e-6), 50)) == {0}
  assert set(draws(logits, Sampling(temperature=1e6), 200)) == {0, 1, 2, 3}


def test_scores_are_log_probabilities():
  logits = np.random.default_rng(2).standard_normal((2, 3, 7)).astype(np.float32) * 30
  target = np.array([[0, 6, 3], [2, 2, 5]])
  exact = logits.astype(np.float64)
  wanted = np.take_along_axis(
    exact - np.log(np.exp(exact).sum(-1, keepdims=True)), target[..., None], -1
  )
  np.testing.assert_allclose(
    score(jnp.asarray(logits), jnp.asarray(target)), wanted[..., 0], atol=2e-5
  )


def test_without_temperature_the_first_of_the_likeliest_is_drawn():
  logits = np.full((2, V), -np.inf, np.float32)
  logits[0, [7, 11, 49]] = 2.5
  logits[1, 49] = -1e30
  tokens, _, _ = jax.jit(sample)(jnp.asarray(logits), SamplerState.new([Sampling()] * 2, V))
  assert tokens.tolist() == [7, 49]

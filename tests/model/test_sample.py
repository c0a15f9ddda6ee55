"""The sampler of slots against a plain one in float64, and the bits of its programs against each other."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from neurojax.config import Sampling
from neurojax.model import sample as sampler
from neurojax.model.sample import Drawn, SamplerState, kind_of, score, settings_of, tops, widest

pytestmark = pytest.mark.optimized  # bits are compared between programs

V = 50
_sample = jax.jit(sampler.sample, static_argnames=("kind", "sort", "top"))
_open = jax.jit(sampler.open_slot)
_count = jax.jit(sampler.count, static_argnames="kind")
observe = jax.jit(sampler.observe)


def replay(state: SamplerState, slot: int, tokens: Sequence[int]) -> SamplerState:
  """Counts tokens as drawn in a slot, one after the other."""
  for token in tokens:
    given = np.array([slot]), np.array([token], np.int32), np.ones(1, bool)
    state = _count(state, *given, kind="full")
  return state


def opened(
  requests: Sequence[Sampling], vocab_size: int = V, stop_ids: Sequence[int] = ()
) -> SamplerState:
  """Slots that hold one sequence each, in this order."""
  state = SamplerState.new(len(requests), vocab_size)
  for slot, request in enumerate(requests):
    state = _open(state, slot, settings_of(request, stop_ids, vocab_size))
  return state


def sample(logits, state: SamplerState, slots=None, live=None, **options) -> tuple:
  """Draws a token for each slot; by the widest program, if no kind is given."""
  slots = range(len(logits)) if slots is None else slots
  live = np.ones(len(slots), bool) if live is None else live
  options = {"kind": "full", "sort": False} | options
  return _sample(
    jnp.asarray(logits), state, jnp.asarray(slots, jnp.int32), jnp.asarray(live), **options
  )


def same(a: object, b: object) -> bool:
  """Whether two trees of arrays are equal in every bit."""
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


# ---- against the definition


def weighed(logits, sampling: Sampling, prompt, answer, allowed, stop_ids) -> np.ndarray:
  """The logits before the temperature, by the words of `Sampling`, in float64."""
  logits = logits.astype(np.float64)
  seen = np.isin(np.arange(len(logits)), [*prompt, *answer])
  count = np.bincount(answer, minlength=len(logits))
  factor = sampling.repetition_penalty
  logits = np.where(seen, np.where(logits > 0, logits / factor, logits * factor), logits)
  logits -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
  for token, bias in sampling.logit_bias:
    logits[token] += bias
  logits[~allowed] = -np.inf
  if len(answer) < sampling.min_tokens:
    rest = logits.copy()
    rest[list(stop_ids)] = -np.inf
    logits = rest if rest.max() > -np.inf else logits
  return logits


def kept(logits: np.ndarray, sampling: Sampling, slack: float = 0.0) -> np.ndarray:
  """Which tokens may be drawn, by sorting, in float64; with slack a hair more (or fewer) of them."""
  logits = (logits - logits.max()) / (sampling.temperature or 1)
  ok = logits > -np.inf
  if sampling.top_k:
    ok &= logits >= np.sort(logits)[::-1][min(sampling.top_k, len(logits)) - 1]
  prob = np.where(ok, np.exp(logits), 0)
  if sampling.top_p < 1:
    falling = np.sort(prob)[::-1]
    enough = sampling.top_p * (1 + slack) * prob.sum()
    last = min(np.searchsorted(np.cumsum(falling), enough), len(falling) - 1)
    ok &= logits >= np.sort(np.where(ok, logits, -np.inf))[::-1][last]
  return ok & (np.exp(logits) >= min(1, sampling.min_p * (1 - slack)))


grid = st.integers(-400, 400).map(lambda n: n / 32)
"""Logits that float32 holds exactly, with ties."""
samplings = st.builds(
  Sampling,
  temperature=st.sampled_from([0.0, 1e-6, 0.25, 0.7, 1.0, 3.0, 1e6]),
  top_k=st.one_of(st.none(), st.integers(1, 40)),
  top_p=st.sampled_from([1e-6, 0.1, 0.55, 0.9, 0.999, 1.0]),
  min_p=st.sampled_from([0.0, 1e-3, 0.3, 1.0]),
  repetition_penalty=st.sampled_from([1.0, 2.0, 0.5]),
  presence_penalty=st.sampled_from([0.0, 0.25, -1.5]),
  frequency_penalty=st.sampled_from([0.0, 0.5, -0.125]),
  logit_bias=st.dictionaries(
    st.integers(0, 6), st.sampled_from([-np.inf, -100.0, -0.5, 2.25, 100.0]), max_size=3
  ),
  min_tokens=st.integers(0, 5),
  seed=st.integers(0, 2**64 - 1),
)


@st.composite
def rows(draw):
  size = draw(st.sampled_from([7, 33]))
  tokens = st.lists(st.integers(0, size - 1), max_size=6)
  logits = np.array(draw(st.lists(grid, min_size=size, max_size=size)), np.float32)
  few = st.sets(st.integers(0, size - 1), min_size=1, max_size=3)
  allowed = np.isin(np.arange(size), list(draw(st.one_of(few, st.just(range(size))))))
  return logits, draw(samplings), draw(tokens), draw(tokens), allowed, draw(few)


def packed(allowed: np.ndarray) -> np.ndarray:
  bits = np.pad(allowed, (0, -len(allowed) % 32))
  return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


@given(rows())
@settings(max_examples=200)
def test_tokens_are_those_of_the_definition(row):
  logits, sampling, prompt, answer, allowed, stop_ids = row
  exact = weighed(*row)
  state = opened([sampling], len(logits), sorted(stop_ids))
  padded = np.array([*prompt, *[0] * 6], np.int32)[:6]
  state = observe(state, 0, padded, len(prompt))
  state = replay(state, 0, answer)
  options = {"allowed_RW": packed(allowed)[None]}
  drawn, after = sample(logits[None], state, **options)
  sorted_, _ = sample(logits[None], state, sort=True, **options)
  assert same(drawn, sorted_)
  token = int(drawn.token_R[0])
  assert int(after.drawn_P[0]) == len(answer) + 1
  if exact.max() == -np.inf:
    assert np.isnan(drawn.logprob_R[0])
    return
  wide = np.logaddexp.reduce(logits.astype(np.float64))
  np.testing.assert_allclose(drawn.logprob_R[0], logits[token] - wide, atol=2e-6, rtol=1e-6)
  if sampling.temperature == 0:
    assert token == exact.argmax()
    return
  ok = kept(exact, sampling)
  # Where rounding decides what is kept, or which of two tokens is ahead, nothing is promised.
  assume(all((ok == kept(exact, sampling, slack)).all() for slack in (1e-5, -1e-5)))
  key = jax.random.fold_in(
    jax.random.wrap_key_data(np.array(divmod(sampling.seed, 2**32), np.uint32)), len(answer)
  )
  noise = np.asarray(jax.random.gumbel(key, (len(logits),), jnp.float32))
  noisy = np.where(ok, (exact - exact.max()) / sampling.temperature, -np.inf) + noise
  assert ok[token] and noisy[token] >= noisy.max() - 1e-4


@given(st.lists(grid, min_size=33, max_size=33), samplings, st.integers(0, 3))
@settings(max_examples=200)
def test_kept_sets_are_those_of_the_definition(logits, sampling, banned):
  values = np.array(logits)
  values[:banned] = -np.inf
  scaled = ((values - values.max()) / (sampling.temperature or 1)).astype(np.float32)
  own = settings_of(sampling, (), 33)
  found = [
    np.asarray(
      _keep(scaled[None], *(x[None] for x in (own.top_k, own.top_p, own.min_logit)), sort=s)
    )
    for s in (False, True)
  ]
  assert same(*found)
  few, many = (kept(values, sampling, slack) for slack in (-1e-5, 1e-5))
  assert (few <= (found[0][0] > -np.inf)).all() and ((found[0][0] > -np.inf) <= many).all()


_keep = jax.jit(sampler.keep, static_argnames="sort")


@pytest.mark.parametrize(
  "sampling",
  [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.5, top_p=0.6),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.2, top_k=20, top_p=0.8, min_p=0.05),
  ],
  ids=["all", "top_k", "top_p", "min_p", "three"],
)
def test_draws_follow_the_filtered_distribution(sampling: Sampling):
  logits = np.random.default_rng(0).standard_normal(V).astype(np.float32) * 2
  exact = logits.astype(np.float64)
  ok = kept(exact, sampling)
  weight = np.where(ok, np.exp((exact - exact.max()) / sampling.temperature), 0)
  prob = weight / weight.sum()
  number = 4000
  state = SamplerState.new(number, V)
  own = [settings_of(dataclasses.replace(sampling, seed=seed), (), V) for seed in range(number)]
  state = dataclasses.replace(state, settings=jax.tree.map(lambda *x: np.stack(x), *own))
  drawn, _ = sample(np.tile(logits, (number, 1)), state, kind=kind_of(sampling))
  count = np.bincount(drawn.token_R, minlength=V)
  assert count[~ok].sum() == 0, "a token that was filtered out was drawn"
  # Five standard deviations: about one false alarm in a million per token, with fixed seeds never.
  assert (np.abs(count - number * prob) <= 5 * np.sqrt(number * prob * (1 - prob)) + 1).all()


# ---- the same bits from every program

MIXED = [
  Sampling(),
  Sampling(temperature=0.8, seed=4),
  Sampling(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=3),
  Sampling(repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.3),
  Sampling(
    temperature=1.1, top_p=0.7, frequency_penalty=0.21, logit_bias={3: 1.7, 9: -100}, seed=9
  ),
  Sampling(temperature=2.0, seed=2**60),
  Sampling(min_tokens=9),
  Sampling(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1),
]


@pytest.mark.parametrize("vocab_size", [31, 1001])
def test_a_row_gets_the_same_bits_from_every_program_that_serves_it(vocab_size: int):
  rng = np.random.default_rng(vocab_size)
  logits = (rng.standard_normal((8, vocab_size)) * 3).astype(np.float32)
  state = opened(MIXED, vocab_size, (1, 2))
  for slot in range(8):
    state = observe(state, slot, rng.integers(0, vocab_size, 7, np.int32), 7)
    state = replay(state, slot, rng.integers(0, vocab_size, 7, np.int32)[:slot])
  found: dict[int, set] = {slot: set() for slot in range(8)}
  for number, kind in itertools.product((1, 3, 8), ("greedy", "plain", "full")):
    for first, sort in itertools.product(range(0, 8, number), (False, True)):
      if sort and kind != "full":
        continue
      slots = [(first + row) % 8 for row in range(number)]
      drawn, _ = sample(
        logits[slots], state, slots, kind=kind, sort=sort, top=5 if number == 3 else 0
      )
      for row, slot in enumerate(slots):
        if widest([kind, kind_of(MIXED[slot])]) == kind:
          found[slot].add((int(drawn.token_R[row]), np.asarray(drawn.logprob_R)[row].tobytes()))
  assert {slot: len(bits) for slot, bits in found.items()} == dict.fromkeys(range(8), 1)


def test_kinds_are_as_narrow_as_their_settings():
  kinds = ["greedy", "plain", "full", "full", "full", "plain", "full", "greedy"]
  assert [kind_of(request) for request in MIXED] == kinds
  assert [widest(kinds[:n]) for n in range(4)] == ["greedy", "greedy", "plain", "full"]


def test_tokens_stay_those_of_earlier_versions():
  """Written down when every sequence had a sampler of its own."""
  requests = [
    Sampling(),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.2),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, seed=2**63 + 5),
    Sampling(temperature=1.3, top_p=0.8, presence_penalty=0.5, seed=11),
    Sampling(temperature=0.9, min_p=0.1, seed=2**40),
  ]
  rng = np.random.default_rng(7)
  logits = rng.standard_normal((6, 6, V)).astype(np.float32) * 2
  prompt = rng.integers(0, V, (6, 5)).astype(np.int32)
  state = opened(requests)
  for slot in range(6):
    state = observe(state, slot, prompt[slot], 4)
  tokens = []
  for step in range(6):
    drawn, state = sample(logits[step], state)
    tokens.append(drawn.token_R.tolist())
  assert np.transpose(tokens).tolist() == [
    [49, 29, 27, 1, 15, 33],
    [29, 25, 45, 6, 21, 38],
    [27, 16, 44, 42, 1, 15],
    [42, 28, 18, 1, 44, 26],
    [34, 48, 28, 37, 26, 39],
    [23, 32, 11, 6, 6, 8],
  ]


@pytest.mark.parametrize("kind", ["greedy", "plain", "full"])
@pytest.mark.parametrize("sort", [False, True])
def test_a_program_has_no_conditional_and_knows_its_loops(kind, sort: bool):
  state = opened(MIXED)
  slots, live = np.arange(8, dtype=np.int32), np.ones(8, bool)
  logits = jnp.zeros((8, V))
  text = _sample.lower(logits, state, slots, live, kind=kind, sort=sort, top=3).compile().as_text()
  assert " conditional(" not in text
  loops = [line for line in text.splitlines() if re.search(r" while\(", line)]
  assert all("known_trip_count" in line for line in loops)
  assert loops or kind == "greedy"


@pytest.mark.parametrize("kind", ["greedy", "plain"])
def test_only_full_programs_touch_the_tables(kind):
  def run(state: SamplerState):
    slots, live = jnp.arange(8), jnp.ones(8, bool)
    return sampler.sample(jnp.zeros((8, V)), state, slots, live, kind=kind, sort=True)[1]

  program = jax.make_jaxpr(run)(opened(MIXED)).jaxpr
  tables = {v for v in program.invars if v.aval.shape == (8, V)}
  assert len(tables) == 2 and tables <= set(program.outvars)
  assert not tables & {v for eqn in program.eqns for v in eqn.invars if hasattr(v, "count")}


# ---- slots


@pytest.mark.parametrize("kind", ["greedy", "plain", "full"])
def test_rows_that_are_none_change_nothing(kind):
  state = opened(MIXED)
  logits = np.random.default_rng(3).standard_normal((5, V)).astype(np.float32)
  slots = [2, 0, 0, 2, 10**6]
  _, alone = sample(logits[:1], state, [2], kind=kind)
  drawn, after = sample(logits, state, slots, [True, False, False, False, False], kind=kind)
  assert same(after, alone) and drawn.token_R.shape == (5,)
  _, none = sample(logits, state, slots, [False] * 5, kind=kind)
  assert same(none, state)


def test_a_slot_that_is_opened_anew_remembers_nothing_and_others_everything():
  logits = np.random.default_rng(4).standard_normal((8, V)).astype(np.float32)
  state = observe(opened(MIXED), 3, np.array([4, 5], np.int32), 2)
  _, state = sample(logits, state)
  again = _open(state, 3, settings_of(MIXED[4], (1,), V))
  fresh = opened([MIXED[4]], V, (1,))
  assert same(jax.tree.map(lambda x: x[3], again), jax.tree.map(lambda x: x[0], fresh))
  others = [0, 1, 2, 4, 5, 6, 7]
  assert same(*(jax.tree.map(lambda x: x[np.array(others)], s) for s in (again, state)))


@pytest.mark.parametrize("kind", ["plain", "full"])
def test_forced_and_replayed_tokens_count_as_drawn(kind):
  logits = np.random.default_rng(5).standard_normal((4, 8, V)).astype(np.float32)
  first = forced = opened(MIXED)
  tokens, outcomes = [], []
  for step in range(4):
    drawn, first = sample(logits[step], first, kind=kind)
    tokens.append(np.asarray(drawn.token_R))
    outcomes.append(drawn)
  for step in range(3):
    # Other logits, so that the drawn ones would be others; row 0 is left to draw.
    force = np.where(np.arange(8) == 0, -1, tokens[step]).astype(np.int32)
    given = np.where(np.arange(8)[:, None] == 0, logits[step], logits[3 - step]).astype(np.float32)
    drawn, forced = sample(given, forced, kind=kind, forced_R=force)
    assert (np.asarray(drawn.token_R) == tokens[step]).all()
    wanted = score(jnp.asarray(given)[:, None], drawn.token_R[:, None])[:, 0]
    np.testing.assert_allclose(drawn.logprob_R, wanted, rtol=1e-6, atol=1e-6)
  assert same(sample(logits[3], forced, kind=kind), (outcomes[3], first))


def test_counting_tokens_is_forcing_them():
  tokens = np.random.default_rng(6).integers(0, V, (8, 5), np.int32)
  forced = counted = opened(MIXED)
  live = np.ones(8, bool)
  for step in range(3):
    counted = _count(counted, np.arange(8), tokens[:, step], live, kind="full")
    _, forced = sample(np.zeros((8, V), np.float32), forced, forced_R=tokens[:, step])
  assert same(counted, forced)


def test_penalties_by_hand():
  logits = np.array([[2.0, -2.0, 1.0, 0.5]], np.float32)
  sampling = Sampling(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
  state = opened([sampling], 4)
  # Of five places, two are padding: token 3 is not seen.
  state = observe(state, 0, np.array([1, 0, 1, 3, 3], np.int32), 3)
  assert state.prompt_seen_PV.tolist() == [[True, True, False, False]]
  tokens = []
  for _ in range(3):
    drawn, state = sample(logits, state)
    tokens.append(int(drawn.token_R[0]))
  # 2/2 = 1, -4, 1, 0.5: the tie goes to token 0. It pays 0.75 then, and token 2 leads with 1; that is
  # 1/2 - 0.75 next, and token 3 leads with 0.5 against 0.25.
  assert tokens == [0, 2, 3]
  assert state.answer_count_PV.tolist() == [[1, 0, 1, 1]] and state.drawn_P.tolist() == [3]


def test_the_seed_uses_all_its_bits_and_every_draw_is_new():
  seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
  logits = np.zeros((len(seeds), 1000), np.float32)
  state = opened([Sampling(temperature=1.0, seed=seed) for seed in seeds], 1000)
  first, state = sample(logits, state, kind="plain")
  assert len(set(first.token_R.tolist())) == len(seeds)
  second, _ = sample(logits, state, kind="plain")
  assert (first.token_R != second.token_R).all()


@pytest.mark.parametrize("kind", ["greedy", "plain", "full"])
def test_without_temperature_the_first_of_the_likeliest_is_drawn(kind):
  logits = np.full((2, V), -np.inf, np.float32)
  logits[0, [7, 11, 49]] = 2.5
  logits[1, 49] = -1e30
  drawn, _ = sample(logits, opened([Sampling(seed=1), Sampling()]), kind=kind)
  assert drawn.token_R.tolist() == [7, 49]
  np.testing.assert_allclose(drawn.logprob_R, [-np.log(3), 0], rtol=1e-6)


# ---- log-probabilities


@pytest.mark.parametrize("place", [0, 17, V - 1])
@pytest.mark.parametrize("kind", ["greedy", "plain", "full"])
def test_logits_that_are_no_numbers_give_no_log_probability(kind, place: int):
  logits = np.zeros((2, V), np.float32)
  logits[1, place] = np.nan
  drawn, _ = sample(logits, opened(MIXED[1:3]), kind=kind)
  assert np.isnan(drawn.logprob_R).tolist() == [False, True]


def test_where_everything_is_banned_only_a_forced_token_has_a_log_probability():
  logits = np.zeros((3, V), np.float32)
  allowed = np.stack([packed(np.arange(V) == 4), *[packed(np.zeros(V, bool))] * 2])
  state = opened([Sampling(temperature=1.0)] * 3)
  forced = np.array([-1, 9, -1], np.int32)
  drawn, _ = sample(logits, state, kind="plain", allowed_RW=allowed, forced_R=forced)
  assert drawn.token_R.tolist()[:2] == [4, 9]
  np.testing.assert_allclose(drawn.logprob_R, [-np.log(V), -np.log(V), np.nan], rtol=1e-6)
  # Stop ids may be drawn early where nothing else may be.
  early = opened([Sampling(min_tokens=3)] * 2, V, (4,))
  drawn, _ = sample(logits[:2], early, allowed_RW=np.stack([allowed[0], ~allowed[1]]))
  assert drawn.token_R.tolist() == [4, 0] and np.isfinite(drawn.logprob_R).all()


def test_the_likeliest_tokens_are_named_in_order():
  logits = np.array([[1.0, 5.0, 5.0, 0.0, 5.0], [0.0, -1.0, 3.0, 3.0, -np.inf]], np.float32)
  drawn, _ = sample(logits, opened([Sampling(temperature=1.0)] * 2, 5), top=4)
  assert isinstance(drawn, Drawn)
  assert drawn.tops[0].tolist() == [[1, 2, 4, 0], [2, 3, 0, 1]]
  exact = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=1, keepdims=True)
  wanted = np.take_along_axis(exact, np.asarray(drawn.tops[0]), 1)
  np.testing.assert_allclose(drawn.tops[1], wanted, atol=1e-6)
  assert same(jax.jit(tops, static_argnums=1)(logits, 4), drawn.tops)


@given(
  st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 33, 1000]), st.sampled_from([0.1, 3.0, 40.0])
)
@settings(max_examples=40)
def test_scores_are_log_probabilities_whose_bits_know_no_order(seed: int, size: int, width: float):
  rng = np.random.default_rng(seed)
  logits = (rng.standard_normal((2, 3, size)) * width).astype(np.float32)
  target = rng.integers(0, size, (2, 3))
  exact = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)
  found = jax.jit(score)(logits, target)
  wanted = np.take_along_axis(exact, target[..., None], -1)[..., 0]
  np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=1e-6)
  order = rng.permutation(size)
  assert same(jax.jit(score)(logits[..., order], np.argsort(order)[target]), found)


def test_settings_that_do_not_fit_the_model_are_refused():
  with pytest.raises(ValueError, match=r"logit_bias 50: ids of this model go from 0 to 49"):
    settings_of(Sampling(logit_bias={3: 1.0, 50: 1.0}), (), V)
  with pytest.raises(ValueError, match="stop id -1"):
    settings_of(Sampling(), (-1,), V)
  with pytest.raises(ValueError, match="33 stop ids: give at most 32"):
    settings_of(Sampling(), range(33), V)
  with pytest.raises(ValueError, match="vocab_size = 600000"):
    SamplerState.new(0, 600_000)

"""Sizing over thousands of random fleets: what is promised holds for each."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from neurojax import count, forms
from neurojax.config import ModelConfig, Span
from neurojax.count.serving import stage_bytes
from neurojax.count.working import DeviceKind, working
from neurojax.plan.fleet import Device, Fleet, Host, Link, read_fleet
from neurojax.scaling import fits
from neurojax.scaling.candidates import VOCAB_SIZE, candidates
from neurojax.scaling.fits import Need
from neurojax.scaling.law import CHINCHILLA_BESIROGLU, CHINCHILLA_HOFFMANN, TERNARY_SPECTRA1
from neurojax.scaling.purpose import ServePurpose, TrainPurpose
from neurojax.scaling.size import HYSTERESIS, one_host, size
from neurojax.scaling.stages import reserved
from tests.scaling.shapes import configs

PACKED = ServePurpose.of(weights="w2a8", scales=forms.TERNARY_FORMATS["ternary-g128"])
PURPOSES = [
  PACKED,
  ServePurpose.of(context=8192, sequences=16),
  ServePurpose.of(weights="int8", context=100),
  TrainPurpose(),
  TrainPurpose(sequences=4, context=512, optimizer="muon", remat=False, diloco=True),
]

sizes = st.floats(6, 13.5).map(lambda power: int(10**power))
rooms = st.lists(sizes, min_size=1, max_size=12)


def fleet(free: list[int], kind: DeviceKind = "cuda", **speeds: float) -> Fleet:
  return Fleet(
    hosts=tuple(
      Host(name=f"h{i}", devices=(Device(kind=kind, memory_bytes=space, **speeds),))
      for i, space in enumerate(free)
    )
  )


@pytest.mark.parametrize("vocab_size", [50257, VOCAB_SIZE, 151936])
def test_every_candidate_is_valid_and_they_are_in_order(vocab_size: int):
  every = candidates(vocab_size)
  parameters = [count.parameters(config) for config in every]
  assert parameters == sorted(parameters) and len(set(every)) == len(every)
  for config in every:
    assert config.head_dim in (64, 128)
    assert config.num_heads * config.head_dim == config.model_dim
    assert config.num_heads % config.num_kv_heads == 0 and config.num_kv_heads < config.num_heads
    assert config.model_dim % 256 == config.ffn_dim % 256 == 0
    assert config.num_layers >= 2
    assert config.num_layers <= config.model_dim / 64 <= 2 * max(2, config.num_layers)
    assert 8 / 3 <= config.ffn_dim / config.model_dim < 8 / 3 + 256 / config.model_dim
  # The order of candidates does not depend on the context, and steps are small once models are.
  assert [count.parameters(config) for config in candidates(vocab_size, 8192)] == parameters
  steps = [b / a for a, b in itertools.pairwise(parameters) if a > 500e6]
  assert max(steps) < 1.2 and parameters[-1] > 31e12, "8 TB hold no more in two bits"


@given(
  config=configs(),
  purpose=st.sampled_from(PURPOSES),
  first=st.integers(0, 5),
  length=st.integers(1, 6),
)
@settings(max_examples=300, deadline=None)
def test_any_stage_is_linear_in_its_layers(config, purpose, first, length):
  first %= config.num_layers
  last = min(first + length, config.num_layers) - 1
  span = Span(first_layer=first, last_layer=last, num_layers=config.num_layers)
  needed = fits.need(config, purpose)
  counted = needed.stage(len(span), first=span.is_first, last=span.is_last)
  assert counted == purpose.stage_bytes(config, span)
  assert needed.total == purpose.stage_bytes(config, Span.whole(config))


needs = st.builds(
  Need,
  num_layers=st.integers(1, 7),
  base=st.integers(0, 5),
  layer=st.integers(1, 6),
  first=st.integers(0, 9),
  last=st.integers(0, 9),
  whole=st.integers(0, 18),
)


def brute_force(needed: Need, free: list[int]) -> bool:
  """Every order of every choice of places, as many layers on each as fit."""
  for number in range(1, len(free) + 1):
    for order in itertools.permutations(range(len(free)), number):
      for cut in itertools.combinations(range(1, needed.num_layers), number - 1):
        counts = [b - a for a, b in itertools.pairwise((0, *cut, needed.num_layers))]
        if all(
          needed.stage(n, first=i == 0, last=i == number - 1) <= free[place]
          for i, (place, n) in enumerate(zip(order, counts, strict=True))
        ):
          return True
  return False


@given(needed=needs, free=st.lists(st.integers(0, 40), min_size=1, max_size=4))
@settings(max_examples=600, deadline=None)
def test_what_fits_is_what_brute_force_finds(needed: Need, free: list[int]):
  possible = brute_force(needed, free)
  assert fits.fits(needed, free) == possible
  for speeds in (None, [1.0 + i for i in range(len(free))]):
    placed = fits.place(needed, free, speeds)
    assert (placed is not None) == possible
    if placed is not None:
      check_placed(needed, free, placed)
  missing = fits.missing_bytes(needed, free)
  assert (missing == 0) == possible
  if missing:
    most = max(range(len(free)), key=lambda i: free[i])
    for more, enough in ((missing, True), (missing - 1, False)):
      other = [space + more * (i == most) for i, space in enumerate(free)]
      assert brute_force(needed, other) == enough


def test_what_no_integer_of_a_machine_holds_does_not_fit():
  purpose = ServePurpose.of(context=2**31, sequences=2**20)
  assert fits.largest(purpose, [2**50] * 3) is None
  needed = fits.need(candidates()[0], purpose)
  assert not fits.fits(needed, [2**50] * 3)
  missing = fits.missing_bytes(needed, [2**50])
  assert needed.total > 2**60 and missing == needed.total - 2**50
  with pytest.raises(ValueError, match="memory is too small"):
    size(one_host(2**50), purpose)


def test_a_stage_has_room_for_what_its_programs_work_in():
  for kind, dtype in itertools.product(("cuda", "cpu"), ("float32", "bfloat16")):
    purpose = ServePurpose.of(dtype=dtype)
    hosts = (Host(name="a", devices=(Device(kind=kind, memory_bytes=10**9),)),)
    found = size(Fleet(hosts=hosts), purpose, headroom=0.0)
    [stage] = found.stages
    whole = Span.whole(found.config)
    held = stage_bytes(
      found.config, whole, dataclasses.replace(purpose.load(found.config), working=False)
    )
    needs = working(found.config, dtype=dtype, weights="dense", capacity=2048, kind=kind)
    assert stage.memory_bytes == held + needs.stage(len(whole), is_last=True) <= 10**9
    # A CPU has all of its bfloat16 layers in float32 beside them.
    assert (held > 0.4 * 10**9) == ((kind, dtype) != ("cpu", "bfloat16"))


@given(rooms, st.integers(0, 11), st.integers(1, 10**12), st.data())
@settings(max_examples=150, deadline=None)
def test_more_memory_never_trains_the_same_model_slower(free, at, more, data):
  speeds = data.draw(
    st.lists(st.sampled_from([1e12, 3e12, 1e13]), min_size=len(free), max_size=len(free))
  )

  def machines(free: list[int]) -> Fleet:
    pairs = enumerate(zip(free, speeds, strict=True))
    return Fleet(
      hosts=tuple(
        Host(name=f"h{i}", devices=(Device(kind="cuda", memory_bytes=m, flops_per_s=f),))
        for i, (m, f) in pairs
      ),
      bytes_per_s=1e24,
    )

  grown = [space + more * (i == at % len(free)) for i, space in enumerate(free)]
  try:
    here = size(machines(free), TrainPurpose())
  except ValueError:
    reject()
  there = size(machines(grown), TrainPurpose(), current=here.config)
  if there.config == here.config:
    ours, theirs = here.speed.train_tokens_per_s, there.speed.train_tokens_per_s
    assert theirs >= ours * (1 - 1e-9)


def check_placed(needed: Need, free: list[int], placed: list[tuple[int, int]]) -> None:
  assert sum(layers for _, layers in placed) == needed.num_layers
  assert len({index for index, _ in placed}) == len(placed)
  for order, (index, layers) in enumerate(placed):
    size = needed.stage(layers, first=order == 0, last=order == len(placed) - 1)
    assert layers >= 1 and size <= free[index]


@given(
  free=rooms,
  purpose=st.sampled_from(PURPOSES),
  at=st.integers(0, 11),
  more=st.integers(1, 10**12),
)
@settings(max_examples=700, deadline=None)
def test_more_memory_never_gives_a_smaller_model(free, purpose, at, more):
  here = fits.largest(purpose, free)
  at %= len(free)
  grown = [space + more * (i == at) for i, space in enumerate(free)]
  for other in (grown, [*free, more], [*free, free[at]]):
    there = fits.largest(purpose, other)
    if here is not None:
      assert there is not None
      assert count.parameters(there) >= count.parameters(here)
  if here is None:
    assert not fits.fits(fits.need(candidates(context_length=purpose.context)[0], purpose), free)
    reject()
  # It fits by the count of each stage, and no candidate above it does.
  needed = fits.need(here, purpose)
  placed = fits.place(needed, free)
  assert placed is not None
  check_placed(needed, free, placed)
  every = candidates(context_length=purpose.context)
  larger = every[every.index(here) + 1 :]
  for above in (*larger[:2], *larger[7::150]):
    assert not fits.fits(fits.need(above, purpose), free)


@given(
  free=rooms,
  purpose=st.sampled_from(PURPOSES),
  headroom=st.sampled_from([0.0, 0.1, 0.5]),
  known=st.booleans(),
  kind=st.sampled_from(["cuda", "cpu"]),
)
@settings(max_examples=150, deadline=None)
def test_a_sized_model_keeps_within_memory_and_covers_its_layers(
  free, purpose, headroom, known, kind
):
  speeds = {"read_bytes_per_s": 1e11, "flops_per_s": 1e13} if known else {}
  machines = fleet(free, kind, **speeds)
  try:
    found = size(machines, purpose, headroom=headroom, time_limit_s=0.2)
  except ValueError as error:
    assert "memory is too small" in str(error)
    allowed = [int(space * (1 - headroom)) for space in free]
    assert fits.largest(purpose, allowed, kinds=[kind] * len(free)) is None
    reject()
  assert found.parameters == count.parameters(found.config)
  covered = [i for s in found.stages for i in range(s.first_layer, s.last_layer + 1)]
  assert covered == list(range(found.config.num_layers))
  by_label = {place.label: place.free_bytes for place in machines.places()}
  assert len({stage.label for stage in found.stages}) == len(found.stages)
  for stage in found.stages:
    span = Span(
      first_layer=stage.first_layer,
      last_layer=stage.last_layer,
      num_layers=found.config.num_layers,
    )
    assert stage.memory_bytes == purpose.stage_bytes(found.config, span, kind)
    assert stage.free_bytes == by_label[stage.label]
    assert stage.memory_bytes <= stage.free_bytes * (1 - headroom)
    assert (stage.step_s is not None) == known
  for host in found.hosts:
    assert host.headroom_bytes == host.free_bytes - host.memory_bytes >= 0
  assert sum(h.memory_bytes for h in found.hosts) == sum(s.memory_bytes for s in found.stages)
  speed = found.speed
  serving = isinstance(purpose, ServePurpose)
  assert (speed.decode_tokens_per_s is not None) == (speed.prefill_tokens_per_s is not None)
  assert (speed.decode_tokens_per_s is not None) == (known and serving)
  assert (speed.train_tokens_per_s is not None) == (known and not serving)
  assert (found.train_days is not None) == (known and not serving)
  table = found.table()
  for field in dataclasses.fields(ModelConfig):
    value = getattr(found.config, field.name)
    plain = list(value) if isinstance(value, tuple) else value
    assert field.name not in table if value is None else table[field.name] == plain


@given(start=st.floats(7.5, 13), purpose=st.sampled_from(PURPOSES))
@settings(max_examples=40, deadline=None)
def test_a_small_change_of_memory_does_not_change_the_answer(start: float, purpose):
  memory = 10**start
  try:
    current = size(one_host(int(memory)), purpose).config
  except ValueError:
    reject()
  changes = []
  for _ in range(30):
    memory *= 1.02
    found = size(one_host(int(memory)), purpose, current=current)
    assert found.parameters >= count.parameters(current)
    if found.config != current:
      assert not found.kept
      changes.append(found.parameters / count.parameters(current))
    current = found.config
  assert all(ratio >= HYSTERESIS for ratio in changes)
  # And with less memory it is kept while it fits, replaced by the largest that does then.
  needed = fits.need(current, purpose).total
  just = math.ceil(needed / 0.9) + 1
  assert size(one_host(just), purpose, current=current).kept
  less = one_host(int((needed - 1) / 0.9))
  try:
    found = size(less, purpose, current=current)
  except ValueError:
    reject()
  assert not found.kept and "no longer fits" in found.notes[0]
  assert found.config == size(less, purpose).config


def test_what_is_missing_is_enough():
  with pytest.raises(ValueError, match="memory is too small: 4,500,000 bytes") as caught:
    size(one_host(5_000_000), ServePurpose.of(sequences=4))
  message = str(caught.value)
  assert "14,386,432 parameters" in message and "ternary weights would fit" not in message
  more = int(message.split(" bytes more on host")[0].rsplit(" ", 1)[1].replace(",", ""))
  size(one_host(5_000_000 + more), ServePurpose.of(sequences=4))
  with pytest.raises(ValueError, match="too small"):
    size(one_host(5_000_000 + more - 4), ServePurpose.of(sequences=4))
  with pytest.raises(ValueError, match="or ternary weights would fit without more memory"):
    size(one_host(12_000_000), ServePurpose.of())
  with pytest.raises(ValueError, match="or one sequence at a time would fit without more memory"):
    size(one_host(40_000_000), ServePurpose.of(sequences=64))
  with pytest.raises(ValueError, match="or layers rematerialized would fit without more memory"):
    size(one_host(1_580_000_000), TrainPurpose(remat=False))


@pytest.mark.parametrize(("options", "said"), [
  ({"headroom": 1.0}, "headroom = 1.0: a share"),
  ({"headroom": -0.1}, "headroom = -0.1"),
  ({"mfu": 0.0}, "mfu = 0.0"),
  ({"tokens": 1e9, "days": 3.0}, "contradict each other"),
  ({"tokens": -1.0}, "tokens = -1.0"),
  ({"days": 3.0}, "how fast this trains is unknown"),
  ({"most_parameters": 0.0}, "most_parameters = 0.0"),
])  # fmt: skip
def test_contradictory_input_is_refused(options: dict, said: str):
  with pytest.raises(ValueError, match=said):
    size(one_host(10**11), TrainPurpose(), **options)


def test_pinned_hosts_are_refused_and_hosts_kept_out_are_left_out():
  hosts = tuple(
    Host(name=name, memory_bytes=10**10, layers=n) for name, n in (("a", None), ("b", 3))
  )
  with pytest.raises(ValueError, match="layers are pinned on b"):
    size(Fleet(hosts=hosts), PACKED)
  out = Fleet(hosts=(hosts[0], dataclasses.replace(hosts[1], layers=0)))
  assert size(out, PACKED).config == size(Fleet(hosts=hosts[:1]), PACKED).config
  with pytest.raises(ValueError, match="keeps every host out"):
    size(Fleet(hosts=(dataclasses.replace(hosts[1], layers=0),)), PACKED)


def test_predictions_by_hand():
  machines = fleet([10**10], read_bytes_per_s=1e11, flops_per_s=1e13)
  found = size(machines, PACKED)
  weights = found.stages[0].memory_bytes
  assert 0.8 * weights / 1e11 < 1 / found.speed.decode_tokens_per_s < 1.2 * weights / 1e11
  training = size(machines, TrainPurpose(), days=10.0, mfu=0.5)
  rate = training.speed.train_tokens_per_s
  per_token = count.flops_per_token(training.config, context=2048, mode="train")
  assert rate == pytest.approx(0.5 * 1e13 / per_token)
  assert training.losses.tokens == pytest.approx(10 * 86400 * rate)
  assert training.train_days == pytest.approx(10)
  for law in (CHINCHILLA_BESIROGLU, CHINCHILLA_HOFFMANN):
    losses = size(machines, TrainPurpose(), tokens=5e9, law=law).losses
    assert losses.bf16 == law.loss(training.parameters, 5e9)
    assert losses.ternary_low < losses.ternary_high
  capped = size(machines, PACKED, most_parameters=1e9)
  assert 0.9e9 < capped.parameters <= 1e9
  with pytest.raises(ValueError, match="no term in tokens"):
    size(machines, PACKED, law=TERNARY_SPECTRA1)
  assert size(machines, PACKED, law=TERNARY_SPECTRA1, tokens=3e11).losses.law == "spectra-1-ternary"


def test_training_gives_fast_devices_more_layers_and_slow_links_set_the_pace():
  machines = fleet([2 * 10**10] * 2, flops_per_s=1e13)
  fast = dataclasses.replace(machines.hosts[0].devices[0], flops_per_s=3e13)
  uneven = dataclasses.replace(
    machines, hosts=(dataclasses.replace(machines.hosts[0], devices=(fast,)), machines.hosts[1])
  )
  even, found = size(machines, TrainPurpose()), size(uneven, TrainPurpose())
  assert even.config == found.config
  # Memory has the slow one hold about half, and the fast one has the head beside its layers.
  assert [stage.label for stage in found.stages] == ["h1", "h0"]
  assert found.speed.train_tokens_per_s > even.speed.train_tokens_per_s
  roomy = [dataclasses.replace(h, devices=(dataclasses.replace(h.devices[0], memory_bytes=10**11),))
           for h in uneven.hosts]  # fmt: skip
  ample = size(Fleet(hosts=tuple(roomy)), TrainPurpose(), current=found.config, most_parameters=2e9)
  layers = {s.label: s.last_layer - s.first_layer + 1 for s in ample.stages}
  assert ample.config == found.config and layers["h0"] >= 2 * layers.get("h1", 0)
  link = Link(hosts=("h0", "h1"), latency_s=0.0, bytes_per_s=1e5)
  slow = size(dataclasses.replace(machines, links=(link,)), TrainPurpose())
  assert slow.speed.train_tokens_per_s == pytest.approx(1e5 / (2 * slow.config.model_dim))
  assert any(line.what == "slowest link" for line in slow.arithmetic)


def test_reserved_memory_is_the_headroom_of_each_place():
  hosts = (
    Host(name="a", devices=(Device(kind="cuda", memory_bytes=1000, used_bytes=200),) * 2),
    Host(name="b", memory_bytes=500),
    Host(name="c", memory_bytes=100, devices=(Device(kind="cpu", memory_bytes=900),)),
  )
  places = reserved(Fleet(hosts=hosts), 0.25).places()
  assert [place.free_bytes for place in places] == [600, 600, 375, 75]


def test_thousands_of_hosts_are_sized_in_seconds():
  # Each holds a few layers; only memory is known, so that planning is not what is timed.
  found = size(fleet([48 * 10**9, 12 * 10**9] * 1000), PACKED)
  assert found.parameters == count.parameters(candidates()[-1])
  found = size(fleet([10**9] * 1000), ServePurpose.of())
  # No host holds a layer of a wider candidate, and deeper ones of this width are none.
  assert len(found.stages) == found.config.num_layers == found.config.model_dim / 64
  assert any("% of the memory is used" in note for note in found.notes)


def test_machines_are_named_by_a_fleet_its_name_or_the_memory_of_one():
  assert size("64GB") == size(64 * 10**9) == size(one_host(64 * 10**9), "serve")
  assert size("lab", "train", law="hoffmann") == size(
    read_fleet("lab"), TrainPurpose(), law=CHINCHILLA_HOFFMANN
  )
  with pytest.raises(ValueError, match="write a number with"):
    size("64 apples")
  with pytest.raises(ValueError, match="or one of cpu, gaming-pc"):
    size("nowhere")


def test_a_notebook_shows_a_sized_model_with_its_texts_escaped():
  host = Host(name="<i>a</i>", devices=(Device(kind="cuda", memory_bytes=10**10),))
  found = size(Fleet(hosts=(host,)))
  shown = found._repr_html_()
  assert found.summary() in shown and "&lt;i&gt;a&lt;/i&gt;" in shown and "<i>" not in shown
  assert "loss, ternary" in shown

import contextlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.config import ModelConfig, Serving, Span
from neurojax.count.serving import Load, stage_bytes
from neurojax.forms import Scales
from neurojax.plan.fleet import Fleet, Host, check_address, parse_bytes, read_fleet
from neurojax.plan.proportional import proportional


def config(num_layers: int, tied: bool = True) -> ModelConfig:
  return ModelConfig(
    vocab_size=512,
    model_dim=64,
    num_layers=num_layers,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=128,
    tied_embedding=tied,
  )


LOAD = Load(serving=Serving(weights="dense", context=256, sequences=2), working=False)


@given(
  layers=st.integers(1, 40),
  free=st.lists(st.integers(0, 20_000_000), min_size=1, max_size=7),
  tied=st.booleans(),
  weights=st.sampled_from(["dense", "int8", "w2a16"]),
  ternary=st.sets(st.sampled_from(["q_DNH", "down_FD", "embedding_VD", "head_DV"]), min_size=1),
)
@settings(max_examples=150, deadline=None)
def test_a_plan_covers_each_layer_once_in_order_and_fits(layers, free, tied, weights, ternary):
  model = config(layers, tied)
  load = Load(
    serving=Serving(weights=weights, context=256, sequences=2),
    forms={name: Scales(64, 2) for name in ternary},
    working=False,
  )
  hosts = [(f"h{i}", space) for i, space in enumerate(free)]
  try:
    placements = proportional(model, hosts, load)
  except ValueError as error:
    assert "too small" in str(error)
    # What it says is missing is enough, and one byte less is not.
    missing, name = re.search(r"([\d,]+) bytes more on (h\d)", str(error)).groups()
    for more, enough in (
      (int(missing.replace(",", "")), True),
      (int(missing.replace(",", "")) - 1, False),
    ):
      larger = [(host, space + more * (host == name)) for host, space in hosts]
      with contextlib.nullcontext() if enough else pytest.raises(ValueError, match="too small"):
        proportional(model, larger, load)
    return
  covered = [i for p in placements for i in range(p.span.first_layer, p.span.last_layer + 1)]
  assert covered == list(range(layers))
  names = [p.host for p in placements]
  assert names == sorted(names) and len(set(names)) == len(names)
  for placement in placements:
    assert placement.memory_bytes == stage_bytes(model, placement.span, load)
    assert placement.memory_bytes <= placement.free_bytes == dict(hosts)[placement.host]


def test_shares_follow_free_memory():
  big = 1_000_000_000
  placements = proportional(config(40), [("a", big), ("b", 3 * big), ("c", big)], LOAD)
  assert [len(p.span) for p in placements] == [8, 24, 8]


def test_a_small_end_host_gives_its_layers_away_but_keeps_what_fits():
  model = config(8)
  one = stage_bytes(model, Span(first_layer=0, last_layer=0, num_layers=8), LOAD)
  placements = proportional(model, [("small", one), ("large", 10**9)], LOAD)
  assert [(p.host, len(p.span)) for p in placements] == [("large", 8)] or len(
    placements[0].span
  ) == 1
  # A host that cannot even hold the embedding is left out, and the model still runs.
  placements = proportional(model, [("none", 1000), ("large", 10**9)], LOAD)
  assert [(p.host, len(p.span)) for p in placements] == [("large", 8)]


def test_more_hosts_than_layers_leaves_hosts_out():
  placements = proportional(config(2), [(f"h{i}", 10**9) for i in range(5)], LOAD)
  assert sum(len(p.span) for p in placements) == 2 and len(placements) == 2


def test_too_small_says_how_many_bytes_are_missing():
  with pytest.raises(
    ValueError, match=r"2 hosts have 800,000 bytes.*[\d,]+ bytes more on a would do"
  ):
    proportional(config(8), [("a", 400_000), ("b", 400_000)], LOAD)
  with pytest.raises(ValueError, match="no hosts"):
    proportional(config(8), [], LOAD)


def test_fleets_from_text_and_file(tmp_path):
  assert read_fleet("127.0.0.1:7001, [::1]:7002").hosts == (
    Host(address="127.0.0.1:7001"),
    Host(address="[::1]:7002"),
  )
  path = tmp_path / "fleet.toml"
  path.write_text('[[hosts]]\naddress = "gpu:7001"\nmemory_bytes = 5\n[[hosts]]\naddress = "b:1"\n')
  assert read_fleet(str(path)) == Fleet(
    hosts=(Host(address="gpu:7001", memory_bytes=5), Host(address="b:1"))
  )
  for bad, named in (
    ("", "at least one"),
    ("a:1,a:1", "listed twice"),
    ("host", "host:port"),
    ("h:99999", "host:port"),
  ):
    with pytest.raises(ValueError, match=named):
      read_fleet(bad)
  path.write_text('[[hosts]]\naddress = "gpu:7001"\nmemory = 5\n')
  with pytest.raises(ValueError, match="unknown key 'memory'"):
    read_fleet(str(path))
  with pytest.raises(ValueError, match="no such file"):
    read_fleet(str(tmp_path / "none.toml"))
  check_address("localhost:0")


@pytest.mark.parametrize(
  ("text", "size"),
  [
    ("6GB", 6 * 10**9),
    ("512MiB", 512 << 20),
    ("1.5kB", 1500),
    ("42", 42),
    (" 1 TiB ", 1 << 40),
    ("1PB", 10**15),
  ],
)
def test_sizes(text: str, size: int):
  assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1EB", "2PB", "0", "1 2", "nan"])
def test_bad_sizes(text: str):
  with pytest.raises(ValueError, match="size"):
    parse_bytes(text)

import dataclasses
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.config import from_toml, to_toml
from neurojax.plan import tiers
from neurojax.plan.fleet import (
  BYTES_PER_S,
  LATENCY_S,
  LOCAL_BYTES_PER_S,
  LOCAL_LATENCY_S,
  DecodeRates,
  Device,
  Fleet,
  Host,
  Link,
  merged,
  read_fleet,
)

FILES = sorted((Path(__file__).parents[2] / "configs" / "fleet").glob("*.toml"))

RATES = st.floats(1e3, 1e16)
SECONDS = st.floats(0, 10)


@st.composite
def devices(draw: st.DrawFn) -> Device:
  memory = draw(st.integers(1, 2**45))
  return Device(
    kind=draw(st.sampled_from(["cuda", "cpu"])),
    name=draw(st.none() | st.text(max_size=20)),
    memory_bytes=memory,
    used_bytes=draw(st.integers(0, memory)),
    read_bytes_per_s=draw(st.none() | RATES),
    flops_per_s=draw(st.none() | RATES),
    flops_dtype=draw(st.sampled_from(["bfloat16", "float32"])),
    upload_bytes_per_s=draw(st.none() | RATES),
    decode_bytes_per_s=DecodeRates(dense=draw(st.none() | RATES), w2a8=draw(st.none() | RATES)),
    layer_overhead_s=draw(SECONDS),
    step_overhead_s=draw(SECONDS),
    sample_s_per_entry=draw(SECONDS),
    handover_s=draw(SECONDS),
  )


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
  number = draw(st.integers(1, 5))
  hosts = tuple(
    Host(
      name=f"h{i}",
      address=draw(st.none() | st.just(f"h{i}:7001")),
      memory_bytes=draw(st.none() | st.integers(1, 2**45)),
      devices=tuple(draw(st.lists(devices(), max_size=3))),
      layers=draw(st.none() | st.integers(0, 200)),
    )
    for i in range(number)
  )
  pairs = [(f"h{i}", f"h{j}") for i in range(number) for j in range(i)]
  chosen = draw(st.sets(st.sampled_from(pairs))) if pairs else set()
  return Fleet(
    hosts=hosts,
    links=tuple(
      Link(hosts=pair, latency_s=draw(SECONDS), bytes_per_s=draw(RATES)) for pair in sorted(chosen)
    ),
    latency_s=draw(SECONDS),
    coordinator=draw(st.none() | st.just("h0")),
  )


@given(fleet=fleets())
@settings(max_examples=100, deadline=None)
def test_toml_round_trip(fleet: Fleet):
  assert from_toml(Fleet, to_toml(fleet)) == fleet


@given(fleet=fleets())
@settings(max_examples=100, deadline=None)
def test_places_are_the_devices_in_order_and_never_larger_than_what_is_free(fleet: Fleet):
  silent = [host for host in fleet.hosts if not host.devices and host.memory_bytes is None]
  if silent:
    with pytest.raises(ValueError, match=f"{silent[0].label} says neither"):
      fleet.places()
    return
  places = fleet.places()
  assert [place.host for place in places] == [
    host for host in fleet.hosts for _ in range(max(1, len(host.devices)))
  ]
  assert len({place.label for place in places}) == len(places)
  for place in places:
    assert 0 <= place.free_bytes <= place.device.memory_bytes - place.device.used_bytes
    assert place.free_bytes <= (place.host.memory_bytes or 2**62)
    several = len(place.host.devices) > 1
    assert place.label.startswith(place.host.label + ("/" if several else ""))


@given(fleet=fleets(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_links_go_both_ways(fleet: Fleet, data: st.DataObject):
  labels = st.sampled_from([None, *(host.label for host in fleet.hosts)])
  a, b = data.draw(labels), data.draw(labels)
  there, back = fleet.link(a, b), fleet.link(b, a)
  assert (there.latency_s, there.bytes_per_s) == (back.latency_s, back.bytes_per_s)
  said = [link for link in fleet.links if set(link.hosts) == {a, b}]
  if said:
    assert there == said[0]
  elif a == b and a is not None:
    assert (there.latency_s, there.bytes_per_s) == (LOCAL_LATENCY_S, LOCAL_BYTES_PER_S)
  else:
    assert (there.latency_s, there.bytes_per_s) == (fleet.latency_s, BYTES_PER_S)


def test_seconds_of_a_message():
  assert Link(hosts=("a", "b"), latency_s=0.5, bytes_per_s=100.0).seconds(50) == 1.0
  assert Fleet(hosts=(Host(name="a"),)).link("a", None).latency_s == LATENCY_S
  with pytest.raises(ValueError, match="called 'c'"):
    Fleet(hosts=(Host(name="a"),)).link("a", "c")


def test_a_form_that_was_not_measured_reads_at_best():
  device = Device(
    kind="cpu", memory_bytes=1, read_bytes_per_s=8.0, decode_bytes_per_s=DecodeRates(int8=5.0)
  )
  assert device.decode_rate("int8") == 5.0 and device.decode_rate("dense") == 8.0
  assert Device(kind="cpu", memory_bytes=1).decode_rate("w2a8") is None


ONE = '[[hosts]]\nname = "a"\n'
DEVICE = ONE + '[[hosts.devices]]\nkind = "cpu"\nmemory_bytes = 100\n'
LINK = (
  ONE + '[[hosts]]\nname = "b"\n[[links]]\nhosts = ["a", "b"]\nlatency_s = 0.1\nbytes_per_s = 9\n'
)


@pytest.mark.parametrize(
  ("text", "wanted"),
  [
    ("", "missing key 'hosts'"),
    ("hosts = []", "at least one host"),
    ("[[hosts]]\nlayers = 1", "no address: give it either"),
    ('[[hosts]]\nname = " "', "name = ' '"),
    (ONE + ONE, "two hosts are called a"),
    (ONE + '[[hosts]]\naddress = "a:1"\n[[hosts]]\naddress = "a:1"', "a:1 is listed twice"),
    (ONE + "memory_bytes = 0", "host a: memory_bytes = 0"),
    (ONE + "layers = -1", "host a: layers = -1"),
    (ONE + "layers = 1.5", "expected int"),
    (DEVICE + "used_bytes = 101", "host a: used_bytes = 101: it must be between 0 and .* 100"),
    (DEVICE + "used_bytes = -1", "host a: used_bytes = -1"),
    (DEVICE + "read_bytes_per_s = 0.0", "host a: read_bytes_per_s = 0.0"),
    (DEVICE + "flops_per_s = -1.0", "host a: flops_per_s = -1.0"),
    (DEVICE + "upload_bytes_per_s = inf", "host a: upload_bytes_per_s = inf"),
    (DEVICE + "layer_overhead_s = -1e-6", "host a: layer_overhead_s"),
    (DEVICE + "step_overhead_s = nan", "host a: step_overhead_s = nan"),
    (DEVICE + "handover_s = -1.0", "host a: handover_s = -1"),
    (DEVICE + "decode_bytes_per_s = {int8 = -1}", "host a: decode_bytes_per_s.int8 = -1"),
    (DEVICE + "decode_bytes_per_s = {int4 = 1}", "unknown key 'int4'"),
    (DEVICE + "speed = 1", "unknown key 'speed'"),
    (DEVICE.replace("cpu", "tpu"), "choose one of 'cuda', 'cpu'"),
    (DEVICE.replace("100", "0"), "host a: memory_bytes = 0"),
    (LINK.replace('["a", "b"]', '["a", "c"]'), "host 'c' of a link"),
    (LINK.replace('["a", "b"]', '["a", "a"]'), "a link of a to itself"),
    (LINK.replace('["a", "b"]', '["a"]'), "a link has two ends"),
    (LINK.replace("0.1", "-0.1"), "link a - b: latency_s = -0.1"),
    (LINK.replace("= 9", "= 0"), "link a - b: bytes_per_s = 0"),
    (LINK + '[[links]]\nhosts = ["b", "a"]\nlatency_s = 0\nbytes_per_s = 1', "two links between"),
    ("latency_s = -1\n" + ONE, "latency_s = -1"),
    ("local_bytes_per_s = 0\n" + ONE, "local_bytes_per_s = 0"),
    ('coordinator = "z"\n' + ONE, "host 'z'"),
  ],
)
def test_bad_fleets_are_refused_by_host_and_value(text: str, wanted: str):
  with pytest.raises(ValueError, match=wanted) as caught:
    from_toml(Fleet, text, where="fleet.toml")
  assert str(caught.value).startswith("fleet.toml")


def test_a_name_that_is_a_place_of_another_host_is_refused():
  card = Device(kind="cuda", memory_bytes=1)
  with pytest.raises(ValueError, match="two hosts are called a/cuda1"):
    Fleet(hosts=(Host(name="a", devices=(card, card)), Host(name="a/cuda1")))


def test_a_host_without_an_address_cannot_be_reached():
  assert Host(address="a:1").reach() == "a:1" and Host(address="a:1").label == "a:1"
  with pytest.raises(ValueError, match="host b has no address"):
    Host(name="b").reach()


def test_merging_joins_what_each_host_says_of_itself():
  card = Device(kind="cuda", memory_bytes=10)
  link = Link(hosts=("a", "b"), latency_s=0.1, bytes_per_s=1.0)
  here = Fleet(
    hosts=(Host(name="a", devices=(card,)), Host(name="b", address="b:1", memory_bytes=5)),
    links=(link,),
    coordinator="a",
  )
  there = Fleet(
    hosts=(Host(name="b", devices=(card, card)), Host(name="c", memory_bytes=7)),
    links=(Link(hosts=("b", "c"), latency_s=0.2, bytes_per_s=2.0),),
  )
  whole = merged([here, there])
  assert whole.hosts == (
    here.hosts[0],
    Host(name="b", address="b:1", devices=(card, card)),
    Host(name="c", memory_bytes=7),
  )
  assert whole.links == here.links + there.links and whole.coordinator == "a"
  again = dataclasses.replace(there, links=(dataclasses.replace(link, hosts=("b", "c")),))
  assert merged([whole, again]) == whole
  # Who is known by an address may call itself otherwise.
  itself = Fleet(
    hosts=(Host(name="bee", address="b:1", layers=0), Host(name="d")),
    links=(Link(hosts=("bee", "d"), latency_s=0.3, bytes_per_s=3.0),),
  )
  both = merged([here, itself])
  assert [host.label for host in both.hosts] == ["a", "b", "d"] and both.hosts[1].layers == 0
  assert both.links[1].hosts == ("b", "d")


@given(fleet=fleets())
@settings(max_examples=50, deadline=None)
def test_merging_a_fleet_with_itself_changes_nothing(fleet: Fleet):
  assert merged([fleet, fleet]) == fleet


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_fleet_files_are_what_their_first_line_writes(path: Path):
  command = path.read_text().splitlines()[0]
  [*module, name, where] = shlex.split(command.removeprefix("# "))
  assert module == ["python", "-m", "neurojax.plan.tiers"]
  assert where == f"configs/fleet/{path.name}"
  assert path.read_text() == tiers.text(name, where)
  assert read_fleet(str(path)) == tiers.fleet(name)


def test_every_named_fleet_has_a_file_and_tiers_have_the_memory_they_are_called_by():
  assert {path.stem for path in FILES} == set(tiers.NAMES)
  for name, memory_gb in tiers.TIERS.items():
    cards = len(tiers.fleet(name).places())
    assert memory_gb - 80 < cards * (40 if memory_gb <= 400 else 80) <= memory_gb
  with pytest.raises(ValueError, match="choose one of cpu"):
    tiers.fleet("moon")


@pytest.mark.parametrize(
  ("device_kind", "tflops"),
  [
    ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H200", 989.4), ("NVIDIA A100-SXM4-40GB", 312.0),
    ("NVIDIA L40S", 362.05), ("NVIDIA L4", 121.0), ("cpu", None),
    ("NVIDIA GeForce RTX 3060 Laptop GPU", None),
  ],
)  # fmt: skip
def test_the_datasheet_of_a_data_center_gpu_is_found_by_what_jax_calls_it(device_kind, tflops):
  found = tiers.datasheet_flops_per_s(device_kind)
  assert found == (None if tflops is None else tflops * 1e12)

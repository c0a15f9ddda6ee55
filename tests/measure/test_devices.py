import dataclasses
import json
import math

import jax
import pytest
from flax import nnx

from neurojax import count, forms
from neurojax.config import ModelConfig, Span, from_dict
from neurojax.forms import Scales
from neurojax.measure.machine import devices
from neurojax.measure.random_model import GROUP, random_model
from neurojax.model import params
from neurojax.plan.fleet import DecodeRates, Device, Host
from neurojax.stage.compile import CompiledStage

CONFIG = ModelConfig(
  vocab_size=256,
  model_dim=192,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  head_dim=48,
  ffn_dim=320,
  tied_embedding=False,
)


@pytest.mark.parametrize("weights", devices.FORMS)
@pytest.mark.parametrize("layers", [(0, 3), (0, 1), (1, 2), (2, 3)])
def test_random_stages_take_what_is_counted(weights: forms.Weights, layers: tuple[int, int]):
  span = Span(first_layer=layers[0], last_layer=layers[1], num_layers=4)
  model = random_model(CONFIG, span, weights=weights)
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
  names = [name for name, _ in params.layer_names(CONFIG)]
  names += [name for name, _ in params.outer_names(CONFIG, Span.whole(CONFIG))]
  ternary = {name: Scales(GROUP, 2) for name in names if not name.endswith("norm_D")}
  assert held == count.span_bytes(CONFIG, span, dtype="float32", weights=weights, forms=ternary)


def test_working_memory_is_counted_beside_the_weights():
  middle = random_model(CONFIG, Span(first_layer=1, last_layer=2, num_layers=4))
  stage = CompiledStage(middle, context_length=128, buckets=(1, 64))
  # The feed-forward activations of 64 positions at least, and no second copy of the weights.
  assert 64 * CONFIG.ffn_dim * 4 <= stage.working_bytes < stage.weight_bytes


def test_a_quick_probe_gives_a_device_of_finite_positive_rates():
  device = devices.probe_device(devices.QUICK)
  assert device.kind == "cpu" and device.flops_dtype == "float32" and device.name
  assert 0 < device.free_bytes < device.memory_bytes
  for rate in (device.read_bytes_per_s, device.flops_per_s, device.upload_bytes_per_s):
    assert rate is not None and 1e6 < rate < 1e15
  assert device.decode_bytes_per_s == DecodeRates(w2a8=device.decode_rate("w2a8"))
  assert 1e5 < (device.decode_rate("w2a8") or 0) < 1e15
  assert 0 < device.step_overhead_s < 1
  for seconds in (device.layer_overhead_s, device.sample_s_per_entry):
    assert 0 <= seconds < 1 and math.isfinite(seconds)
  Host(name="here", devices=(device,))


def test_nothing_larger_than_an_eighth_of_what_is_free_is_measured():
  assert devices.GPU.within(1 << 40) == devices.GPU
  small = devices.GPU.within(1 << 31)
  assert small.read_bytes == small.wide_bytes == 1 << 28


def test_devices_are_measured_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch):
  asked = []

  def child(arguments, environment, say=None):
    asked.append((list(arguments), environment))
    if arguments == ["--list"]:
      return json.dumps(["cuda", "cuda"])
    kind = "cpu" if environment.get("JAX_PLATFORMS") == "cpu" else "cuda"
    return json.dumps({"kind": kind, "memory_bytes": 9, "decode_bytes_per_s": {"int8": 2.0}})

  monkeypatch.setattr(devices, "_child", child)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
  found = devices.probe_devices(quick=True)
  assert [device.kind for device in found] == ["cuda", "cuda", "cpu"]
  assert found[0] == from_dict(Device, json.loads(child([], {})), where="")
  assert [environment for _, environment in asked[1:4]] == [
    {"CUDA_VISIBLE_DEVICES": "3"},
    {"CUDA_VISIBLE_DEVICES": "5"},
    {"JAX_PLATFORMS": "cpu"},
  ]
  assert from_dict(devices.Sizes, json.loads(asked[1][0][0]), where="") == devices.QUICK
  devices.probe_devices(layers_of=CONFIG, forms=["int8"])
  sizes = from_dict(devices.Sizes, json.loads(asked[-1][0][0]), where="")
  assert sizes == dataclasses.replace(devices.CPU, wide=CONFIG, forms=("int8",))


def test_a_measuring_process_that_fails_says_why():
  with pytest.raises(OSError, match=r"(?s)measuring with JAX_PLATFORMS=moon failed.*'moon'"):
    devices._child([], {"JAX_PLATFORMS": "moon"})

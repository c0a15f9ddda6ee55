"""The same run over any mesh, and over processes."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from neurojax.layout import Layout, spec
from neurojax.train.step import abstract_state, init_state
from tests.train import tiny

LAYOUTS = [Layout(data=8), Layout(data=2, fsdp=2, tensor=2)]
STEPS = 2


def recipe(layout: Layout = Layout()):
  return tiny.config(
    quantization=tiny.TERNARY, layout=layout, accumulation=2, z_loss=1e-3, batch_size=8
  )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.data}x{x.fsdp}x{x.tensor}")
def test_a_mesh_gives_the_losses_of_one_device(layout: Layout):
  wanted, one = tiny.run(recipe(), STEPS)
  found, many = tiny.run(recipe(layout), STEPS)
  for a, b in zip(found, wanted, strict=True):
    assert a == pytest.approx(b, rel=1e-4)
  for name, w in many.params.items():
    # Adam makes a whole step of a gradient that is nothing but rounding: a few weights differ.
    difference = np.abs(np.asarray(w) - np.asarray(one.params[name]))
    assert difference.mean() < 3e-5, name
    assert len(w.sharding.device_set) == 8


def test_initial_weights_are_the_same_on_any_mesh_and_lie_where_the_letters_say():
  one = init_state(recipe(), tiny.mesh(recipe()))
  config = recipe(Layout(fsdp=4, tensor=2))
  many = init_state(config, tiny.mesh(config))
  # XLA may round the last bit of a normal number otherwise in another program.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one.params, many.params)
  parts = {name: w.addressable_shards[0].data.shape for name, w in many.params.items()}
  assert parts["up_DF"] == (2, 64 // 4, 128 // 2)
  assert parts["o_NHD"] == (2, 4 // 2, 16, 64 // 4)
  assert parts["embedding_VD"] == (64 // 2, 64 // 4)
  assert parts["attn_sub_norm_NH"] == (2, 4, 16)
  abstract = abstract_state(config, tiny.mesh(config))
  assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), abstract) == jax.tree.map(
    lambda a: (a.shape, a.dtype, a.sharding), many
  )
  spread = [w for w in jax.tree.leaves(many.opt_state) if w.shape == (2, 64, 128)]
  assert len(spread) == 4
  assert {w.addressable_shards[0].data.shape for w in spread} == {(2, 16, 64)}


def test_letters_are_axes():
  assert spec("LDF") == PartitionSpec(None, "fsdp", "tensor")
  assert spec("DKH", gathered=True) == PartitionSpec(None, "tensor", None)
  assert spec("BT") == PartitionSpec(("data", "fsdp"), None)


@pytest.mark.parametrize(("layout", "changes", "message"), [
  (Layout(data=3), {}, r"batch_size = 8 is no multiple of layout.data x layout.fsdp = 3 x 1"),
  (Layout(tensor=4), {}, r"K = 2 is no multiple of layout.tensor = 4: key-value heads"),
  (Layout(fsdp=5), {"batch_size": 5}, r"D = 64 is no multiple of layout.fsdp = 5"),
])  # fmt: skip
def test_what_cannot_be_spread_is_named(layout: Layout, changes, message: str):
  with pytest.raises(ValueError, match=message):
    tiny.config(layout=layout, **changes)


def test_a_layout_of_another_number_of_devices_is_refused():
  with pytest.raises(ValueError, match=r"3 x fsdp 1 x tensor 1 = 3 devices, and there are 8"):
    Layout(data=3).mesh()
  with pytest.raises(ValueError, match=r"layout.tensor = 0"):
    Layout(tensor=0)


def test_two_processes_give_the_losses_of_one():
  """Two real processes of two devices each, over gloo; each puts its own rows."""
  layout = Layout(data=2, tensor=2)
  wanted, _ = tiny.run(recipe(layout), STEPS)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environment = {
    **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "PYTHONPATH": str(Path(__file__).parents[2]),
  }  # fmt: skip
  processes = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.train.processes", str(port), str(index)],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )
    for index in range(2)
  ]  # fmt: skip
  try:
    outputs = [process.communicate(timeout=280) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, errors) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, errors[-2000:]
  for out, _ in outputs:
    found = json.loads(out.splitlines()[-1])
    for a, b in zip(found["metrics"], wanted, strict=True):
      assert a == pytest.approx(b, rel=1e-4)
  assert json.loads(outputs[0][0].splitlines()[-1])["digest"] == pytest.approx(
    json.loads(outputs[1][0].splitlines()[-1])["digest"], rel=0
  )


def test_the_layout_is_all_that_differs():
  assert dataclasses.replace(recipe(LAYOUTS[0]), layout=Layout()) == recipe()

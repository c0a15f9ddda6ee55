"""A compiled stage made of the fused programs, beside the one made of the model as it is."""

import dataclasses
import gc
import logging
import types
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.config import LayerKind, RopeScaling, Sampling, Span
from neurojax.files.dummy import write_dummy
from neurojax.kernels.decode import triton
from neurojax.measure.random_model import random_model
from neurojax.model.neurollm import NeuroLLM
from neurojax.stage import programs
from neurojax.stage.cut import cut
from neurojax.stage.fused import fuse
from neurojax.stage.kernels import REFERENCE, Kernels
from neurojax.stage.runtime import StageRuntime
from neurojax.stage.step import Row
from tests.stage.compiling import (
  BUCKETS,
  LLAMA,
  PROMPT,
  QWEN,
  answer,
  check_any_cut,
  load,
  stage,
  write,
)

TOKEN_KERNEL = dataclasses.replace(REFERENCE, programs=1, interpret=True)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
  return write(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(("family", "mode"), [("llama", "w2a16"), ("qwen3", "w2a8")])
def test_in_float32_it_is_the_model(paths, family: str, mode: str):
  """A prompt of several buckets, the last one padded, and tokens one by one."""
  plain = answer([stage(load(paths[family], mode, "float32"), None, programs="model")])
  fused = answer([stage(load(paths[family], mode, "float32"))])
  assert len(set(plain[2].round(3))) > 10, "the scores differ among themselves"
  # Of int8 a level may round the other way: rarely, and the weights decide by how much that shows.
  typical, atol = (1e-5, 1e-4) if mode == "w2a16" else (0.01, 0.1)
  assert np.median(np.abs(fused[2] - plain[2])) < typical
  np.testing.assert_allclose(fused[2], plain[2], atol=atol)
  np.testing.assert_allclose(fused[1], plain[1], atol=atol)
  assert fused[0] == plain[0]


@pytest.mark.parametrize("kernels", [REFERENCE, TOKEN_KERNEL], ids=["reference", "token kernel"])
def test_in_bfloat16_it_errs_no_more_than_the_model(nothing_ahead, exact, paths, kernels: Kernels):
  wanted, plain = exact
  _, _, scores = answer([stage(load(paths["qwen3"], "w2a8"), kernels)])
  assert np.std(scores - wanted) < 1.2 * np.std(plain - wanted) < 0.1


@pytest.fixture(scope="module")
def exact(paths) -> tuple[np.ndarray, np.ndarray]:
  """The model's scores in float32 and in bfloat16."""
  models = (load(paths["qwen3"], "w2a8", dtype) for dtype in ("float32", "bfloat16"))
  return tuple(answer([stage(model, None, programs="model")])[2] for model in models)


def test_fused_programs_take_no_drafts(paths):
  made = stage(load(paths["llama"], "w2a8"), slots=2)
  assert made.most_drafts == 0 and "fused" in made.why_no_drafts


def test_any_cut_gives_the_bits_of_the_whole_stages_token_kernel(nothing_ahead, paths):
  """Other kernels' bits are compared in tests/stage/test_compile_cuts.py, as users have them compiled."""
  check_any_cut(paths["llama"], "w2a8", TOKEN_KERNEL, ((0, 0), (1, 2)))


def test_weights_are_in_memory_once(paths):
  model = load(paths["qwen3"], "w2a8")
  gone = [
    weakref.ref(param.get_value().codes)
    for param in (model.layers.attention.q_DNH, model.layers.ffn.up_DF)
  ]
  kept = weakref.ref(model.layers.ffn.down_FD.get_value().codes)
  fused = stage(model)
  gc.collect()
  assert [ref() for ref in gone] == [None, None] and kept() is not None
  assert model.head_DV.get_value() is None
  assert fused.weight_bytes == fuse(load(paths["qwen3"], "w2a8")).nbytes
  assert fused.cache_bytes == 2 * 3 * 2 * 128 * 32 * 2


def test_activations_are_float32_and_others_are_refused(paths):
  span = Span(first_layer=1, last_layer=2, num_layers=3)
  last = stage(load(paths["qwen3"], "w2a8", span=span))
  assert (last.programs, last.dtype, last.activations) == ("fused", jnp.bfloat16, np.float32)
  runtime = StageRuntime(last)
  runtime.open(0, Sampling())
  hidden = np.ones((2, 256), jnp.bfloat16)
  [output] = runtime.step([Row(slot=0, start=0, tokens=PROMPT[:2], hidden=hidden)])
  assert str(output.error) == "activations bfloat16[2, 256]: expected float32[2, 256]"


def test_what_cannot_be_fused_is_refused_by_name_and_left_whole(paths, tmp_path: Path):
  def refused(model: NeuroLLM, match: str, kernels: Kernels | None = REFERENCE) -> None:
    with pytest.raises(NotImplementedError, match=f"fused programs cannot run this model: {match}"):
      stage(model, kernels)
    assert model(jnp.asarray(PROMPT[None]))[0].shape == (1, 41, 97)

  refused(load(paths["qwen3"], "dense"), "q_DNH is not ternary")
  refused(load(paths["qwen3"], "w2a8"), "their kernels are for GPUs, this is a cpu", None)
  refused(load(paths["qwen3"], "w2a8"), "their kernels are for GPUs", Kernels())
  odd = dataclasses.replace(QWEN, head_dim=48)
  write_dummy(tmp_path / "odd.gguf", odd, "Q2_0 (group 64)")
  refused(load(tmp_path / "odd.gguf", "w2a8"), "head width 48", TOKEN_KERNEL)


def test_wishes_that_make_no_sense_are_refused(paths):
  model = load(paths["qwen3"], "w2a8")
  with pytest.raises(ValueError, match="programs = 'fast': choose one of auto, model, fused"):
    stage(model, None, programs="fast")
  with pytest.raises(ValueError, match="are for fused programs: leave them out"):
    stage(model, programs="model")


# ---- the rule of "auto"


@pytest.fixture
def said(caplog) -> list[tuple[str, str]]:
  """Levels and messages of the rule's log."""
  programs._say.cache_clear()
  caplog.set_level(logging.INFO, "neurojax.stage.programs")

  def records() -> list[tuple[str, str]]:
    return [(r.levelname, r.getMessage()) for r in caplog.records]

  return records


def choose(model: NeuroLLM, **options) -> programs.Programs:
  return programs.programs_of(model, capacity=128, lengths=BUCKETS, **options)


def test_without_a_gpu_the_model_runs_as_it_is(paths, said):
  for _ in range(2):
    chosen = stage(load(paths["qwen3"], "w2a8"), None, programs="auto")
    assert (chosen.programs, chosen.activations) == ("model", jnp.bfloat16)
  [(level, message)] = said()
  assert level == "INFO" and "for GPUs, this is a cpu" in message


@pytest.fixture
def hopper(monkeypatch) -> types.SimpleNamespace:
  device = types.SimpleNamespace(
    platform="gpu", device_kind="H", compute_capability="9.0", core_count=132
  )
  monkeypatch.setattr(programs, "_device", lambda: device)
  return device


def test_on_a_gpu_that_could_the_log_warns(paths, said, hopper):
  assert choose(load(paths["qwen3"], "w2a8", "float32")).kind == "model"
  assert choose(load(paths["qwen3"], "dense")).kind == "model"
  hopper.compute_capability = "8.0"
  assert choose(load(paths["qwen3"], "w2a8")).kind == "model"
  (first, dtype), (second, dense), (third, old) = said()
  assert (first, second, third) == ("WARNING", "INFO", "WARNING")
  assert "they compute in bfloat16, the dtype is float32" in dtype
  assert "q_DNH is not ternary" in dense
  assert "compute capability 9.0, H has 8.0" in old


def test_norms_that_no_kernel_has_are_a_reason(tmp_path, said, hopper):
  config = dataclasses.replace(LLAMA, rope_style="half", sub_norm=True)
  write_dummy(tmp_path / "bitnet.gguf", config, "Q2_0 (group 64)")
  assert choose(load(tmp_path / "bitnet.gguf", "w2a8")).kind == "model"
  [(level, message)] = said()
  assert level == "WARNING" and "sub_norm = True" in message
  with pytest.raises(NotImplementedError, match="sub_norm"):
    choose(load(tmp_path / "bitnet.gguf", "w2a8"), wanted="fused")


@pytest.mark.parametrize(("field", "value"), [
  ("activation", "gelu_tanh"), ("post_norm", True), ("sliding_window", 16), ("logit_softcap", 30.0),
  ("rope_scaling", RopeScaling(kind="yarn", factor=4.0, original_context_length=64)),
  ("layer_kinds", (LayerKind(), LayerKind(mixer="convolution"))),
])  # fmt: skip
def test_what_no_kernel_computes_is_a_reason(said, hopper, field: str, value):
  more = {"layer_pattern": (0, 1), "conv_width": 3} if field == "layer_kinds" else {}
  config = dataclasses.replace(LLAMA, **{field: value}, **more)
  model = random_model(config, Span.whole(config), dtype=jnp.bfloat16, weights="w2a8")
  assert choose(model).kind == "model"
  [(level, message)] = said()
  assert level == "WARNING" and f"{field}" in message and "fused programs do not compute" in message
  with pytest.raises(NotImplementedError, match=field):
    choose(model, wanted="fused")


NEW_JAX = pytest.mark.skipif(
  jax.__version_info__ < (0, 11, 2), reason="the GPU kernels need jax 0.11.2 or newer"
)


@pytest.mark.skipif(not NEW_JAX.args[0], reason="the GPU kernels are there")
def test_an_old_jax_is_a_reason(paths, said, hopper):
  assert choose(load(paths["qwen3"], "w2a8")).kind == "model"
  [(level, message)] = said()
  assert level == "WARNING" and "0.11.2" in message


@NEW_JAX
def test_on_hopper_the_fused_programs_run(tmp_path, said, hopper):
  config = dataclasses.replace(QWEN, vocab_size=256, num_heads=8, ffn_dim=512)
  write_dummy(tmp_path / "fits.gguf", config, "Q2_0 (group 64)")
  chosen = choose(load(tmp_path / "fits.gguf", "w2a8"))
  device = hopper.device_kind
  assert (chosen.kind, chosen.kernels) == (
    "fused",
    Kernels(programs=132, device=device, invariant=True),
  )
  assert choose(load(tmp_path / "fits.gguf", "w2a16")).kernels == Kernels(
    device=device, invariant=True
  )
  # A vocabulary of 97 is no multiple of 128.
  odd = dataclasses.replace(config, vocab_size=97)
  write_dummy(tmp_path / "odd.gguf", odd, "Q2_0 (group 64)")
  assert choose(load(tmp_path / "odd.gguf", "w2a8")).kind == "model"
  assert said()[-1][0] == "WARNING" and "n = 97 output channels" in said()[-1][1]


def test_a_span_is_asked_about_as_the_whole_model(paths, monkeypatch):
  """Or one of two stages would take a kernel that the whole model cannot."""
  seen = []
  monkeypatch.setattr(triton, "why_not", lambda weights, *_: seen.append(weights.num_layers))
  whole = load(paths["qwen3"], "w2a8")
  part = cut(whole, Span(first_layer=1, last_layer=1, num_layers=3))
  choose(part, wanted="fused", kernels=TOKEN_KERNEL)
  assert set(seen) == {3}

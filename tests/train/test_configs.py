"""The recipes in configs/train: they load, and they are what their comments say."""

import dataclasses
from pathlib import Path

import pytest

from neurojax import count
from neurojax.config import RopeScaling, from_toml, to_toml
from neurojax.train.config import DataConfig, TrainConfig
from tests.train import tiny

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_loads_and_survives_toml(path: Path):
  config = TrainConfig.load(path)
  assert from_toml(TrainConfig, to_toml(config)) == config


def test_the_embedded_model_fits_twenty_megabytes_as_tq2_0():
  config = TrainConfig.load(CONFIGS[0].parent / "embedded.toml")
  model = config.model
  matrices = count.layer_matrices(model).values()
  assert all(k % 256 == 0 for k, _ in matrices)
  packed = model.num_layers * sum(k * n // 256 * 66 for k, n in matrices)
  assert packed + 2 * model.vocab_size * model.model_dim < 19e6
  assert count.parameters(model) == pytest.approx(42e6, rel=0.01)
  # What llama.cpp's bitnet can hold.
  assert model.sub_norm and model.tied_embedding and model.rope_style == "half"
  assert model.num_heads * model.head_dim == model.model_dim


def test_the_twin_differs_in_weights_and_their_decay_alone():
  folder = CONFIGS[0].parent
  ours, twin = (TrainConfig.load(folder / f"embedded{end}.toml") for end in ("", "-bf16"))
  assert dataclasses.replace(twin, quantization=ours.quantization, optimizer=ours.optimizer) == ours
  assert twin.quantization.weights == "none" and twin.optimizer.second_weight_decay is None
  decay = {"second_weight_decay": ours.optimizer.second_weight_decay}
  assert dataclasses.replace(twin.optimizer, **decay) == ours.optimizer


@pytest.mark.parametrize(("changes", "message"), [
  ({"steps": 0}, "steps = 0"), ({"accumulation": 0}, "accumulation = 0"),
  ({"eval_batches": -1}, "eval_batches = -1"), ({"eval_every": 0}, "eval_every = 0"),
  ({"z_loss": -1.0}, "z_loss"), ({"unroll": 0}, "unroll = 0"),
  ({"data": DataConfig(folder="-", batch_size=8, seq_len=65)}, "seq_len = 65 exceeds"),
  ({"attention": "cudnn"}, "computes in bfloat16, not in float32"),
  ({"optimizer": dataclasses.replace(tiny.config().optimizer, warmup_steps=20)}, "of 20 steps"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(changes, message: str):
  with pytest.raises(ValueError, match=message):
    tiny.config(**changes)


@pytest.mark.parametrize(("field", "value"), [
  ("activation", "relu2"), ("sliding_window", 8), ("qkv_bias", True), ("embedding_scale", 2.0),
  ("rope_scaling", RopeScaling(kind="linear", factor=2.0)),
])  # fmt: skip
def test_a_model_that_training_would_compute_otherwise_is_refused_by_name(field: str, value):
  with pytest.raises(ValueError, match=rf"model\.{field}.*the plain decoder"):
    tiny.config(model=dataclasses.replace(tiny.config().model, **{field: value}))


@pytest.mark.parametrize(("values", "message"), [
  ({"group_size": 64}, "means nothing for weights = 'none'"),
  ({"weights": "ternary", "group_size": 100}, "multiple of 64"),
])  # fmt: skip
def test_quantization_that_makes_no_sense_is_refused(values, message: str):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(tiny.TERNARY, **{"weights": "none", "group_size": None, **values})

"""A model of a few thousand weights, and runs of it on random tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from neurojax.config import ModelConfig
from neurojax.layout import sharding
from neurojax.train import optimizer, parameters
from neurojax.train.config import DataConfig, OptimizerConfig, Quantization, TrainConfig
from neurojax.train.step import State, abstract_state, make_train_step

MODEL = ModelConfig(
  vocab_size=64, model_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=128,
  context_length=64, sub_norm=True,
)  # fmt: skip
TERNARY = Quantization(weights="ternary", group_size=64, activations="int8")
SEQ_LEN = 16


def config(**changes: Any) -> TrainConfig:
  """Eight sequences, float32, AdamW; `batch_size` goes into `data`."""
  values: dict[str, Any] = {
    "model": MODEL,
    "optimizer": OptimizerConfig(peak_lr=3e-3, weight_decay=0.1),
    "data": DataConfig(folder="-", batch_size=changes.pop("batch_size", 8), seq_len=SEQ_LEN),
    "steps": 20,
    "compute_dtype": "float32",
  }
  return TrainConfig(**{**values, **changes})


def batch(config: TrainConfig, seed: int) -> np.ndarray:
  """Random windows of one step, int32."""
  shape = (config.accumulation * config.data.batch_size, config.data.seq_len + 1)
  return np.random.default_rng(seed).integers(0, config.model.vocab_size, shape).astype(np.int32)


def mesh(config: TrainConfig) -> jax.sharding.Mesh:
  """As many of the devices as the layout wants."""
  return config.layout.mesh(jax.devices()[: config.layout.devices])


jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiled in half the time: what is run here is small."""


@functools.cache
def weights(model: ModelConfig = MODEL, seed: int = 0) -> dict[str, jax.Array]:
  """Initial master weights."""
  return jit(lambda: parameters.initial(model, seed))()


def seen(config: TrainConfig) -> dict[str, Any]:
  """What a step multiplies by at the start."""
  return jit(lambda w: parameters.effective(w, config))(weights(config.model))


@functools.cache
def compiled(config: TrainConfig) -> Callable[[State, jax.Array], tuple[State, Any]]:
  """The step of a configuration, shared by tests."""
  on = mesh(config)
  rows = config.accumulation * config.data.batch_size
  tokens = jax.ShapeDtypeStruct((rows, SEQ_LEN + 1), np.int32, sharding=sharding(on, "BT"))
  lowered = make_train_step(config, on).lower(abstract_state(config, on), tokens)
  return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


def start(config: TrainConfig) -> State:
  """The state before the first step: that of `init_state`, from weights that tests share."""
  abstract = abstract_state(config, mesh(config))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  first = weights(config.model, config.seed)
  state = State(np.zeros((), np.int32), first, optimizer.transform(config.optimizer).init(first))
  return jax.tree.map(
    lambda leaf, where: jax.make_array_from_callback(
      np.shape(leaf), where, np.array(leaf).__getitem__
    ),
    state,
    shardings,
  )


def run(config: TrainConfig, steps: int = 3) -> tuple[list[dict[str, float]], State]:
  """The metrics of some steps, and the state after them."""
  on = mesh(config)
  state, step = start(config), compiled(config)
  metrics = []
  for i in range(steps):
    tokens = jax.device_put(batch(config, i), sharding(on, "BT"))
    state, found = step(state, tokens)
    metrics.append({name: float(value) for name, value in found.items()})
  return metrics, state

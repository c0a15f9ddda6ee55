"""The compiled functions of a configuration on a mesh, as the loop runs them."""

from collections.abc import Mapping

import jax
import numpy as np

from neurojax import count
from neurojax.data.batches import Rows
from neurojax.layout import sharding
from neurojax.plan.tiers import datasheet_flops_per_s
from neurojax.train.config import TrainConfig
from neurojax.train.step import (
  State,
  abstract_state,
  init_state,
  make_eval_step,
  make_train_step,
)


class MeshProgram:
  """`loop.Program` on the mesh of the configuration's layout, over all devices of all processes."""

  def __init__(self, config: TrainConfig):
    self._config = config
    self._mesh = config.layout.mesh()
    self._where = sharding(self._mesh, "BT")
    self._train = make_train_step(config, self._mesh)
    self._eval = make_eval_step(config, self._mesh)
    self.flops_per_token = count.flops_per_token(
      config.model, context=config.data.seq_len, mode="train"
    )
    self.peak_flops_per_s = peak_flops_per_s(config)

  def init_state(self) -> State:
    return init_state(self._config, self._mesh)

  def abstract_state(self) -> State:
    return abstract_state(self._config, self._mesh)

  def rows(self, batch_size: int) -> Rows:
    indices = self._where.addressable_devices_indices_map((batch_size, 1)).values()
    bounds = [index[0].indices(batch_size) for index in indices if index is not None]
    return Rows(min(first for first, _, _ in bounds), max(end for _, end, _ in bounds))

  def put(self, rows: Rows, local: np.ndarray, batch_size: int) -> jax.Array:
    def part(index: tuple[slice, ...]) -> np.ndarray:
      first, end, _ = index[0].indices(batch_size)
      return local[first - rows.first : end - rows.first]

    return jax.make_array_from_callback((batch_size, local.shape[1]), self._where, part)

  def train_step(self, state: State, tokens: jax.Array) -> tuple[State, Mapping[str, jax.Array]]:
    return self._train(state, tokens)

  def eval_step(self, state: State, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    return self._eval(state.params, tokens)


def peak_flops_per_s(config: TrainConfig) -> float | None:
  """Peak FLOP/s of all devices together; None where it is unknown, as on CPUs."""
  if config.compute_dtype != "bfloat16":
    return None
  each = datasheet_flops_per_s(jax.devices()[0].device_kind)
  return None if each is None else each * config.layout.devices

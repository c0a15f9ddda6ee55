"""Reads initial weights of training from a model file."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from neurojax.config import ModelConfig
from neurojax.files.find import model_path
from neurojax.files.open import open_model
from neurojax.model import params
from neurojax.train import parameters

_MAY_DIFFER = ("context_length",)
"""Fields of the architecture that no weight depends on."""


def from_file(path: str | Path, config: ModelConfig) -> dict[str, Float32[np.ndarray, "..."]]:
  """Reads all weights of a model file, float32, layers stacked on L.

  Raises: ValueError: the file has another architecture than `config`, or a weight is not finite;
    and whatever the file's reader raises.
  """
  with open_model(model_path(str(path))) as file:
    for field in dataclasses.fields(ModelConfig):
      ours, theirs = getattr(config, field.name), getattr(file.config, field.name)
      if ours != theirs and field.name not in _MAY_DIFFER:
        raise ValueError(f"{path}: {field.name} = {theirs!r}, and the run's model has {ours!r}")
    found = {}
    for name in parameters.names(config):
      shape = parameters.shape(config, name)
      if name in params.LAYER:
        values = np.empty(shape, np.float32)
        for layer in range(config.num_layers):
          values[layer] = file.read(name, layer)
      else:
        values = file.read(name)
      if not np.isfinite(values).all():
        raise ValueError(f"{path}: {name} holds NaN or infinity: the file is damaged")
      found[name] = values
  return found

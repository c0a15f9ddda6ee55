"""Both ends of a model: the embedding before the layers, final norm and head after them."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from neurojax.config import ModelConfig
from neurojax.model.attention import softcap
from neurojax.model.norm import rms_norm
from neurojax.model.project import project
from neurojax.weights import matrix


def embed(
  table_VD: Any, tokens: Int[Array, "*shape"], *, dtype: DTypeLike, scale: float = 1.0
) -> Float[Array, "*shape D"]:
  """Looks up the rows of the embedding, in `dtype`.

  Args:
    table_VD: A jax.Array or a `weights.matrix.Matrix`.
    scale: Factor of the rows, rounded to `dtype` (`ModelConfig.embedding_scale`).
  """
  x = matrix.take(table_VD, tokens).astype(dtype)
  return x if scale == 1 else x * jnp.asarray(scale, dtype)


def final_norm(
  x: Float[Array, "*shape D"], scale_D: Float[Array, "D"], eps: float
) -> Float[Array, "*shape D"]:
  """Normalises the activations of the last layer; the head multiplies the result."""
  return rms_norm(x, scale_D, eps)


def head_name(config: ModelConfig) -> str:
  """Canonical name of the matrix that the head multiplies by."""
  return "embedding_VD" if config.tied_embedding else "head_DV"


def head(x_BTD: Float[Array, "B T D"], weight: Any, config: ModelConfig) -> Float32[Array, "B T V"]:
  """Float32 logits of normalised activations.

  Args:
    weight: The parameter called `head_name(config)`.
  """
  axes = head_name(config).rpartition("_")[2]
  logits_BTV = project(f"BTD,{axes}->BTV", x_BTD, weight, dtype=jnp.float32)
  cap = config.logit_softcap
  return logits_BTV if cap is None else softcap(logits_BTV, cap)

"""Turns gradients into steps: schedules, clipping, AdamW and Muon.

At step t the weights move by -lr(t) * (direction + wd(t) * weights). Optax gives the direction;
learning rate and weight decay are functions of the step alone, so that no state holds them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from neurojax.model import params
from neurojax.train.config import OptimizerConfig, TrainConfig
from neurojax.train.parameters import Params, is_projection

_MUON_RMS = 0.2
"""Root mean square of an orthogonalised update. AdamW's is alike: one learning rate suits both."""


def learning_rate(config: TrainConfig, step: Int32[Array, ""]) -> Float32[Array, ""]:
  """The learning rate of step 0, 1 and so on.

  A linear rise over `warmup_steps`, then the decay from 1 to `final_fraction` at the last step, times
  the peak: `peak_lr`, and `second_lr` from `second_stage` of all steps on, where the rate falls at
  once. Source: The Era of 1-bit LLMs, Training Tips, Code and FAQ (microsoft/unilm), section 2;
  the same two stages are in BitNet b1.58 2B4T, arXiv:2504.12285, section 3.
  """
  c = config.optimizer
  t = step.astype(jnp.float32)
  rise = (t + 1) / max(c.warmup_steps, 1)
  # Fraction of the steps after warm-up; 1 is one step past the last.
  progress = jnp.clip((t - c.warmup_steps) / max(config.steps - c.warmup_steps, 1), 0, 1)
  falling = {
    "linear": 1 - progress,
    "cosine": 0.5 + 0.5 * jnp.cos(jnp.pi * progress),
    "constant": jnp.ones_like(progress),
  }[c.decay]
  fraction = c.final_fraction + (1 - c.final_fraction) * falling
  return _staged(config, step, c.peak_lr, c.second_lr) * jnp.minimum(rise, 1) * fraction


def weight_decay(config: TrainConfig, step: Int32[Array, ""]) -> Float32[Array, ""]:
  """The weight decay of a step. Ternary recipes have 0.1 and then 0: weights would not settle otherwise."""
  c = config.optimizer
  return _staged(config, step, c.weight_decay, c.second_weight_decay)


def _staged(
  config: TrainConfig, step: Int32[Array, ""], first: float, second: float | None
) -> Float32[Array, ""]:
  begins = round(config.optimizer.second_stage * config.steps)
  return jnp.where(step < begins, first, first if second is None else second).astype(jnp.float32)


def transform(config: OptimizerConfig) -> optax.GradientTransformation:
  """Makes the transformation from gradients to minus the direction, without rate or weight decay.

  adamw  Adam with bias correction (arXiv:1711.05101)
  muon   momentum, orthogonalised by Newton-Schulz, for the layers' matrices, each as one of K x N
         (K contracted elements); scaled by 0.2 sqrt(max(K, N)) (arXiv:2502.16982, equation 4).
         Embedding, head and norms under Adam with Nesterov momentum
  """
  if config.name == "adamw":
    return optax.chain(
      optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps), optax.scale(-1.0)
    )
  return optax.contrib.muon(
    learning_rate=1.0,
    beta=config.muon_beta,
    eps=config.eps,
    adam_b1=config.beta1,
    adam_b2=config.beta2,
    muon_weight_dimension_numbers=muon_axes,
    consistent_rms=_MUON_RMS,
  )


def muon_axes(tree: Mapping[str, Any]) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
  """Tells the contracted and the output axes of each stacked matrix; None: not for Muon.

  Optax masks parameters that are not for Muon: values may be `optax.MaskedNode`.
  """

  def one(name: str, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    if not is_projection(name):
      return None
    split = 1 + params.contracted(name)
    return optax.contrib.MuonDimensionNumbers(
      tuple(range(1, split)), tuple(range(split, leaf.ndim))
    )

  return {name: one(name, leaf) for name, leaf in tree.items()}


def clip(gradients: Params, clip_norm: float | None) -> tuple[Params, Float32[Array, ""]]:
  """Scales gradients down to a global norm of at most `clip_norm`; returns the norm too (arXiv:1211.5063)."""
  norm = optax.tree.norm(gradients)
  if clip_norm is None:
    return gradients, norm
  scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
  return jax.tree.map(lambda g: g * scale, gradients), norm


def move(
  weights: Params, updates: Params, rate: Float32[Array, ""], decay: Float32[Array, ""]
) -> Params:
  """Computes the weights after a step. Norms do not decay."""

  def one(name: str) -> Array:
    w = weights[name]
    pulled = w - rate * decay * w if params.is_matrix(name) else w
    return pulled + rate * updates[name]

  return {name: one(name) for name in weights}

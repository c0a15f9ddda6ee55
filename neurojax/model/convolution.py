"""Gated short convolutions, which mix a few positions in place of attention."""

import functools

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from neurojax.config import ModelConfig
from neurojax.model.cache import ConvState, Rows
from neurojax.model.initial import normal
from neurojax.model.project import project


class Convolution(nnx.Module):
  """A causal convolution over `conv_width` positions, each channel by itself, gated on both sides.

  Computes out(c * conv(b * u)) with b, c, u = in(x).

  Source: LFM2, arXiv:2511.23404; the order of b, c and u is that of its published weights.
  """

  def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    d, w = config.model_dim, config.conv_width
    self.in_DC = normal(rngs, (d, 3 * d), dtype)
    self.kernel_WM = normal(rngs, (w, d), dtype)
    self.out_MD = normal(rngs, (d, d), dtype)

  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    state: ConvState | None,
    layer: Int[Array, ""],
    rows: Rows,
  ) -> tuple[Float[Array, "B T D"], ConvState | None]:
    """Runs over T positions.

    Args:
      state: Inputs at the positions before; None: there are none.
      rows: Where the rows lie in the state. Padding leaves no trace there.
    """
    batch, length, channels = x_BTD.shape
    kernel_WM = self.kernel_WM[...].astype(jnp.float32)
    width = kernel_WM.shape[0]
    b_BTM, c_BTM, u_BTM = jnp.split(project("BTD,DC->BTC", x_BTD, self.in_DC), 3, axis=-1)
    gated_BTM = b_BTM * u_BTM
    if state is None:
      before_BXM = jnp.zeros((batch, width - 1, channels), gated_BTM.dtype)
    else:
      before_BXM = state.read(layer, rows).astype(gated_BTM.dtype)
    all_BSM = jnp.concatenate([before_BXM, gated_BTM], axis=1)
    taps = [
      all_BSM[:, tap : tap + length].astype(jnp.float32) * kernel_WM[tap][None, None]
      for tap in range(width)
    ]
    mixed_BTM = functools.reduce(jnp.add, taps).astype(x_BTD.dtype)
    if state is not None:
      state = state.write(layer, all_BSM, rows)
    return project("BTM,MD->BTD", c_BTM * mixed_BTM, self.out_MD), state

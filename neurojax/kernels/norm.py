"""RMSNorm of rows on a GPU, by a Triton kernel whose sums have one order for any number of rows.

XLA compiles a norm of one row, of a few and of many to different loops, each with an order of sums of
its own: rows then have other bits beside other rows. It does not do so to what is computed element by
element, nor does a maximum depend on an order: rounding to int8 is left to it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32

from neurojax.kernels import gpus

_ELEMENTS = 4096
"""Elements of a program: one row of a model's width, or several of a head's."""


def normalise(
  x: Float[Array, "... D"], scale_D: Array, eps: float, *, interpret: bool = False
) -> Float32[Array, "... D"]:
  """Compute RMSNorm over the last axis, as `decode.reference.normalise`.

  Raises: NotImplementedError: this JAX cannot compile the kernel.
  """
  if not interpret and (reason := gpus.why_not_jax()):
    raise NotImplementedError(reason)
  rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
  return _rows(rows, scale_D.astype(jnp.float32), eps=eps, interpret=interpret).reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def _rows(x_MD: Array, scale_D: Array, *, eps: float, interpret: bool) -> Array:
  m, d = x_MD.shape
  width = pl.next_power_of_2(d)
  # By the width alone: how a row is summed must not follow the number of rows.
  height = max(1, _ELEMENTS // width)
  return pl.pallas_call(
    functools.partial(_kernel, height=height, width=width, eps=eps),
    grid=(pl.cdiv(m, height),),
    out_shape=jax.ShapeDtypeStruct((m, d), jnp.float32),
    compiler_params=plgpu.CompilerParams(num_warps=8 if width >= _ELEMENTS else 4, num_stages=1),
    interpret=interpret,
    name="rms_norm_rows",
  )(x_MD, scale_D)


def _kernel(x_ref, scale_ref, out_ref, *, height: int, width: int, eps: float):
  m, d = x_ref.shape
  # Rows past the end repeat the last one: every program that writes it writes the same.
  row = jnp.minimum(pl.program_id(0) * height + lax.iota(jnp.int32, height), m - 1)
  column = lax.iota(jnp.int32, width)
  at = (
    jnp.broadcast_to(row[:, None], (height, width)),
    jnp.broadcast_to(column[None], (height, width)),
  )
  mask = at[1] < d
  x = plgpu.load(x_ref.at[at], mask=mask, other=0.0)
  scale = plgpu.load(scale_ref.at[at[1]], mask=mask, other=0.0)
  factor = lax.rsqrt(jnp.sum(x * x, axis=1) / d + eps)
  plgpu.store(out_ref.at[at], x * factor[:, None] * scale, mask=mask)

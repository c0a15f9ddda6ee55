"""Attention of one query of each row over a cache, on a CPU, by the C++ kernel in attend.cc."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from neurojax.kernels.native import library


def why_not(platform: str) -> str | None:
  """Why a platform has no kernel, or None."""
  return f"there is no kernel on {platform}" if platform != "cpu" else library.unavailable()


def attend(
  q_BNH: Float[Array, "B N H"],
  k_LPKSH: Float[Array, "L P K S H"],
  v_LPKSH: Float[Array, "L P K S H"],
  layer: Int[Array, ""],
  start_B: Int[Array, "B"],
  *,
  slot_B: Int[Array, "B"] | None = None,
  softcap: float | None = None,
  window: int | None = None,
) -> Float32[Array, "B N H"]:
  """Computes softmax(cap(q k)) v of the keys at positions up to start_B, in float32.

  Position s is kept in place s modulo S. The bits of a row depend on its own query, keys, values and
  position alone. A row at a position below 0 gets zeros.

  Args:
    q_BNH: Scaled queries; query head n uses key-value head n // (N / K).
    slot_B: Slot of each row in the caches, clipped to those there are; None: row b has slot b.
    softcap: Bound that tanh bends the scores below; None: no bound.
    window: Number of keys that a query sees at most, the last ones; None: all.
  Raises: NotImplementedError: there is no compiled kernel, and `native.library.unavailable` says why.
  """
  q = q_BNH if q_BNH.dtype in (jnp.float32, jnp.bfloat16) else q_BNH.astype(jnp.float32)
  call = jax.ffi.ffi_call(library.target("attend"), jax.ShapeDtypeStruct(q.shape, jnp.float32))
  return call(
    q,
    k_LPKSH,
    v_LPKSH,
    jnp.asarray(layer, jnp.int32),
    start_B.astype(jnp.int32),
    jnp.arange(len(start_B), dtype=jnp.int32) if slot_B is None else slot_B.astype(jnp.int32),
    softcap=np.float32(softcap or 0),
    window=np.int64(window or 0),
  )

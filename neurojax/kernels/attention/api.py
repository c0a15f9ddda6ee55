"""Attention for inference: over a whole prompt, over the cache, and one step of decoding.

Keys and values of all sequences are in one cache [L, P, K, S, H] of P slots; `slot_B` names the slot
of each row of a step. None: row b has slot b.

Each function takes `implementation`: a name, or None for the fastest that this machine and these
shapes allow. Off a GPU that is the reference, which is written to be read. On a GPU the reference
is only a last resort, and the log says so, once for each reason.

    function       on a GPU                     what the reference costs there
    decode         triton, one or two kernels   the whole capacity read, scores in memory
    attend_cache   triton, one or two kernels   likewise
    attend         cudnn                        T x T scores per head in memory
"""

import functools
import logging
from collections.abc import Callable
from typing import Literal, TypeVar

import jax
from jaxtyping import Array, Float, Int

from neurojax.config import RopeStyle
from neurojax.kernels.attention import reference
from neurojax.kernels.attention.reference import rotation as rotation

Implementation = Literal["reference", "triton", "cudnn"]

Result = TypeVar("Result")

log = logging.getLogger(__name__)


def decode(
  qkv_BX: Float[Array, "B X"],
  k_LPKSH: Float[Array, "L P K S H"],
  v_LPKSH: Float[Array, "L P K S H"],
  layer: Int[Array, ""] | int,
  position_B: Int[Array, "B"],
  *,
  slot_B: Int[Array, "B"] | None = None,
  rotation_B2H: Float[Array, "B 2 H"] | None = None,
  rope_style: RopeStyle = "half",
  norms: tuple[Float[Array, "H"], Float[Array, "H"]] | None = None,
  norm_eps: float = 1e-6,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B Y"], Float[Array, "L P K S H"], Float[Array, "L P K S H"]]:
  """Attend for one new token of each sequence, from the projections to the output projection's input.

  Normalises and turns queries and keys, stores the new key and value at `position_B`, and attends
  over keys 0..position_B[b]. For a position outside the cache, or below 0, nothing is stored, so that
  no other row is hurt, and what comes out has no meaning. By Triton a row's result has the same bits
  alone, among any others, and in any slot.

  Args:
    qkv_BX: The heads of queries, then of keys, then of values: X = (N + 2K) * H.
    k_LPKSH: All layers' keys; donate them, and they are written in place. Likewise v_LPKSH.
    layer: Index of the layer, at least 0. An array of any value shares one compiled kernel.
    slot_B: 0 .. P-1. Rows that store nothing may name the slot of another row; others may not.
    rotation_B2H: `rotation(position_B, ...)`, computed once for all layers; None: no rotation.
    norms: RMSNorm scales of queries and of keys, per element of a head (Qwen3); None: no norm.
  Returns: [B, N*H] in the dtype of qkv_BX, and the caches.
  Raises: NotImplementedError: `implementation` is named and does not take these shapes or dtypes.
  """
  kwargs = {
    "slot_B": slot_B,
    "rotation_B2H": rotation_B2H,
    "rope_style": rope_style,
    "norms": norms,
    "norm_eps": norm_eps,
  }
  args = (qkv_BX, k_LPKSH, v_LPKSH, layer, position_B)
  return _first(
    implementation,
    "triton",
    lambda: _triton().decode(*args, **kwargs),
    lambda: reference.decode(*args, **kwargs),
  )


def attend_cache(
  q_BTNH: Float[Array, "B T N H"],
  k_LPKSH: Float[Array, "L P K S H"],
  v_LPKSH: Float[Array, "L P K S H"],
  layer: Int[Array, ""] | int,
  start_B: Int[Array, "B"],
  *,
  slot_B: Int[Array, "B"] | None = None,
  implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
  """Attend with T queries of each sequence over the cache: query t of row b sees keys 0..start_B[b]+t.

  Their own keys are in the cache already. Time follows start_B + T, not the capacity. By Triton, and
  with T > 1, a query's result has the same bits in a chunk of any length, alone, among others, and
  in any slot.

  Raises: NotImplementedError: `implementation` is named and does not take these shapes or dtypes.
  """

  def fast() -> jax.Array:
    if q_BTNH.shape[1] > 1:
      return _triton().attend_cache(q_BTNH, k_LPKSH, v_LPKSH, layer, start_B, slot_B=slot_B)
    return _triton().attend_one(q_BTNH[:, 0], k_LPKSH, v_LPKSH, layer, start_B + 1, slot_B=slot_B)[
      :, None
    ]

  return _first(
    implementation,
    "triton",
    fast,
    lambda: reference.attend_cache(q_BTNH, k_LPKSH, v_LPKSH, layer, start_B, slot_B=slot_B),
  )


def attend(
  q_BTNH: Float[Array, "B T N H"],
  k_BTKH: Float[Array, "B T K H"],
  v_BTKH: Float[Array, "B T K H"],
  length_B: Int[Array, "B"] | None = None,
  *,
  implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
  """Attend causally within whole prompts, which start at position 0 and need no cache yet.

  Args:
    length_B: Positions of each row that count; what comes out beyond them has no meaning.
  Raises: NotImplementedError: `implementation` is named and does not take these shapes or dtypes.
  """

  def cudnn() -> jax.Array:
    return jax.nn.dot_product_attention(
      q_BTNH,
      k_BTKH,
      v_BTKH,
      is_causal=True,
      query_seq_lengths=length_B,
      key_value_seq_lengths=length_B,
      implementation="cudnn",
    )

  return _first(
    implementation, "cudnn", cudnn, lambda: reference.attend(q_BTNH, k_BTKH, v_BTKH, length_B)
  )


def _first(
  implementation: Implementation | None,
  fast: Implementation,
  run_fast: Callable[[], Result],
  run_reference: Callable[[], Result],
) -> Result:
  if implementation not in (None, fast, "reference"):
    raise ValueError(f"implementation = {implementation!r}: choose {fast!r}, 'reference' or None")
  if implementation == fast or (implementation is None and jax.default_backend() == "gpu"):
    try:
      return run_fast()
    except NotImplementedError as error:
      if implementation is not None:
        raise
      _warn(f"attention falls back from {fast} to its slow reference: {error}")
  return run_reference()


_warn = functools.cache(log.warning)
"""Logs each message once."""


def _triton():
  # Imported when needed: it loads the GPU's compiler.
  from neurojax.kernels.attention import triton

  return triton

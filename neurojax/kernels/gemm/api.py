"""Multiplies activations by ternary weights, by the implementation that suits the machine.

An implementation is a module of this folder with `matmul(x, w, *, layer=None, **parameters)` and
`why_not(m, n, k, w)`, which gives a reason or None; one that gains from several weights at
once has `matmul_all(x, weights)`.
"""

import functools
import importlib
import logging
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from neurojax.kernels import gpus
from neurojax.kernels.gemm import tuned
from neurojax.weights.contraction import contract_rows
from neurojax.weights.ternary import TernaryArray, TernaryLayer

log = logging.getLogger(__name__)

Implementation = Literal["reference", "xla", "cpu", "triton", "mosaic"]

_KERNELS: dict[str, tuple[Implementation, ...]] = {"cpu": ("cpu",), "gpu": ("triton", "mosaic")}
"""Kernels by platform. Where nothing was measured, the first that can multiply is taken."""

_PREFILL_ROWS = 128
"""Rows from which on a GPU is bound by its matrix units, so that Mosaic is asked first."""


class Choice(NamedTuple):
  implementation: Implementation
  arguments: dict[str, Any]


def matmul(
  x: Float[Array, "M K"],
  w: TernaryArray | TernaryLayer,
  *,
  implementation: Implementation | None = None,
  **parameters: Any,
) -> Float32[Array, "M N"]:
  """Multiply x by the transposed rows of w, as `reference.matmul` defines it.

  Args:
    x: float32 or bfloat16; other float dtypes are cast to float32.
    w: A single matrix, or a layer of stacked ones, which is not copied.
    implementation: None: chosen when traced, for the platform that JAX would run on.
    parameters: Keyword arguments of the implementation, which must be named then.
  Raises:
    ValueError: shapes or dtypes do not fit, or parameters come without an implementation.
    NotImplementedError: the named implementation cannot multiply these.
  """
  if parameters and implementation is None:
    raise ValueError(f"parameters {sorted(parameters)} belong to an implementation: name it")
  x = _check(x, w)
  if implementation is None:
    return matmul_all(x, w)[0]
  return _multiply(Choice(implementation, parameters), x, [w])[0]


def matmul_all(
  x: Float[Array, "M K"],
  *weights: TernaryArray | TernaryLayer,
  implementation: Implementation | None = None,
) -> list[Float32[Array, "M N"]]:
  """Multiply x by each weight; x is prepared once for those that one implementation multiplies."""
  results: dict[int, Array] = {}
  together: dict[str, tuple[Choice, list[int]]] = {}
  for i, weight in enumerate(weights):
    x = _check(x, weight)
    w = _array(weight)
    choice = Choice(implementation, {}) if implementation else choice_for(x.shape[0], w)
    together.setdefault(f"{choice} {w.mode}", (choice, []))[1].append(i)
  for choice, members in together.values():
    ys = _multiply(choice, x, [weights[i] for i in members])
    results |= dict(zip(members, ys, strict=True))
  return [results[i] for i in range(len(weights))]


def contract(
  spec: str,
  x: Float[Array, "..."],
  w: TernaryArray | TernaryLayer,
  *,
  implementation: Implementation | None = None,
) -> Float32[Array, "..."]:
  """Compute `contract_all` for a single weight."""
  return contract_all(x, (spec, w), implementation=implementation)[0]


def contract_all(
  x: Float[Array, "..."],
  *products: tuple[str, TernaryArray | TernaryLayer],
  implementation: Implementation | None = None,
) -> list[Float32[Array, "..."]]:
  """Compute float32 `einsum(spec, x, w)` for each (spec, w) by `matmul`; weights have no batch axis.

  Args:
    products: specs are like "BTD,DNH->BTNH", "BTNH,NHD->BTD", or "BTD,VD->BTV" if trailing axes
      are contracted. x's last axes are the contracted ones, in the weight's order.
  Raises: ValueError: a spec is of another form, or does not fit the shapes.
  """
  weights = [w for _, w in products]
  return contract_rows(
    x,
    [(spec, _array(w).contraction) for spec, w in products],
    lambda x_MxK: matmul_all(x_MxK, *weights, implementation=implementation),
  )


def choice_for(m: int, w: TernaryArray, *, device: jax.Device | None = None) -> Choice:
  """Choose what multiplies m rows by w; the choice of something slow is logged, once for each reason.

  Args:
    device: The device to compile for; None: the one that JAX would run on.
  """
  device = device or _default_device()
  platform = _platform(device)
  contraction = w.contraction
  entries = tuned.load(device.device_kind)
  entry = tuned.find(entries, w.mode, m, contraction.n, contraction.k)
  reasons = []
  if entry is not None:
    reason = _why_not(entry.implementation, m, w, device)
    if reason is None:
      return Choice(entry.implementation, dict(entry.parameters))
    reasons.append(f"{entry.implementation}: {reason}")
  kernels = _KERNELS.get(platform, ())
  for name in kernels if m < _PREFILL_ROWS else kernels[::-1]:
    reason = _why_not(name, m, w, device)
    if reason is None:
      return Choice(name, {})
    reasons.append(f"{name}: {reason}")
  name = "xla" if platform == "cpu" and _why_not("xla", m, w, device) is None else "reference"
  _warn_once(f"no kernel multiplies by ternary weights on {platform}", "; ".join(reasons))
  return Choice(name, {})


def _why_not(name: Implementation, m: int, w: TernaryArray, device: jax.Device) -> str | None:
  if name == "reference":
    return None
  if name in gpus.CAPABILITIES and (
    reason := gpus.why_not_jax() or gpus.why_not_card(name, device)
  ):
    return reason
  try:
    return _module(name).why_not(m, w.contraction.n, w.contraction.k, w)
  except ImportError as error:
    return str(error)


def _multiply(
  choice: Choice, x: Array, weights: list[TernaryArray | TernaryLayer]
) -> list[Float32[Array, "M N"]]:
  if x.shape[0] == 0:
    return [jnp.zeros((0, _array(w).contraction.n), jnp.float32) for w in weights]
  module = _module(choice.implementation)
  if len(weights) > 1 and not choice.arguments and hasattr(module, "matmul_all"):
    return module.matmul_all(x, weights)
  return [
    module.matmul(x, w.stacked, layer=w.index, **choice.arguments)
    if isinstance(w, TernaryLayer)
    else module.matmul(x, w, **choice.arguments)
    for w in weights
  ]


def _check(x: Array, w: TernaryArray | TernaryLayer) -> Array:
  w_array = _array(w)
  in_front = 1 if isinstance(w, TernaryLayer) else 0
  if w_array.codes.ndim != 2 + in_front:
    raise ValueError(
      f"codes of shape {w_array.codes.shape}: multiply by a single matrix, or by a TernaryLayer of"
      " matrices stacked on one axis"
    )
  if x.ndim != 2 or x.shape[1] != w_array.contraction.k:
    raise ValueError(f"x has shape {x.shape}, the weight contracts {w_array.contraction.k}")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x is {x.dtype}: cast it to float32 or bfloat16")
  return x if x.dtype in (jnp.float32, jnp.bfloat16) else x.astype(jnp.float32)


def _array(w: TernaryArray | TernaryLayer) -> TernaryArray:
  return w.stacked if isinstance(w, TernaryLayer) else w


def default_platform() -> str:
  """The platform that JAX would run on: "cpu", "gpu" or another."""
  return _platform(_default_device())


def _platform(device: jax.Device) -> str:
  return {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)


def _default_device() -> jax.Device:
  device = jax.config.jax_default_device
  return (
    jax.local_devices(backend=device)[0] if device is None or isinstance(device, str) else device
  )


@functools.cache
def _module(name: str) -> ModuleType:
  if name not in get_args(Implementation):
    raise ValueError(f"implementation {name!r}: one of {', '.join(get_args(Implementation))}")
  return importlib.import_module(f"neurojax.kernels.gemm.{name}")


@functools.cache
def _warn_once(what: str, reasons: str) -> None:
  log.warning("%s%s: this will be slow", what, f" ({reasons})" if reasons else "")

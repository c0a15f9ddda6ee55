"""The two kinds of programs that a stage can be compiled from, and the choice between them.

`ModelPrograms` run any model anywhere. `FusedPrograms` are a few large GPU kernels for ternary weights.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from neurojax import config
from neurojax.kernels.decode import api as decode
from neurojax.model import ends, params, project
from neurojax.model.cache import Cache, KVCache, Rows
from neurojax.model.neurollm import NeuroLLM, empty_cache
from neurojax.stage import fused
from neurojax.stage.fused import Fused, fuse
from neurojax.stage.kernels import Kernels
from neurojax.weights.ternary import TernaryArray

log = logging.getLogger(__name__)

Chosen = Literal["model", "fused"]
"""One of `config.Programs` once "auto" is decided."""


@runtime_checkable
class Programs(Protocol):
  """Functions for a stage to compile, over the slots of a cache.

  Attributes:
    kind: "model" or "fused".
    params: All the weights, a tree of arrays; the first argument of every function.
    activations: Dtype of what passes from one stage to the next.
    rows_agree: Whether the bits of a row are the same beside any number of others, so that decode may be
      compiled for several numbers of rows.
    lengths_agree: Whether the bits of a prompt's position are the same in a call of any length.
  """

  kind: Chosen
  params: Any
  activations: np.dtype
  rows_agree: bool
  lengths_agree: bool

  def new_cache(self, *, slots: int, capacity: int) -> Cache:
    """Make an empty cache."""
    ...

  def forward(
    self, params: Any, inputs: Array, cache: Cache, rows: Rows
  ) -> tuple[Float[Array, "B T D"], Cache]:
    """Run T inputs of each row through the layers of the span.

    Args:
      inputs: int32 ids [B, T] if the span is the first, else activations [B, T, D]; B or T is 1.
    """
    ...

  def logits(self, params: Any, x_BTD: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
    """Compute logits by the final norm and the head, which only the last span has."""
    ...

  def step(
    self, params: Any, inputs: Array, cache: Cache, rows: Rows
  ) -> tuple[Float32[Array, "B V"], Cache]:
    """Run one input of each row, [B] or [B, D], through the layers of the last span, to the logits."""
    ...

  @property
  def weight_bytes(self) -> int:
    """Bytes of the weights; arrays that two parameters share count once."""
    ...


class ModelPrograms:
  """Runs the model as it is, on any device and with any weights; activations have the model's dtype.

  Args:
    cache: Dtype of the cache; the model's if absent.
  """

  kind: Chosen = "model"
  lengths_agree: bool = False

  def __init__(self, model: NeuroLLM, cache: DTypeLike | None = None):
    graph, state = nnx.split(model)
    self.params, tree = jax.tree.flatten(state)
    self._rebuild = lambda leaves: nnx.merge(graph, jax.tree.unflatten(tree, leaves))
    self._config, self._span = model.config, model.span
    self._cache = jnp.dtype(cache or model.dtype)
    self.activations = np.dtype(model.dtype)
    self.rows_agree = rows_agree(model)

  def new_cache(self, *, slots: int, capacity: int) -> Cache:
    return empty_cache(self._config, self._span, slots=slots, capacity=capacity, dtype=self._cache)

  def forward(
    self, params: Any, inputs: Array, cache: Cache, rows: Rows
  ) -> tuple[Float[Array, "B T D"], Cache]:
    model = self._rebuild(params)
    x_BTD = model.embed(inputs) if model.span.is_first else inputs
    return model.run_layers(x_BTD, cache=cache, rows=rows)

  def logits(self, params: Any, x_BTD: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
    return self._rebuild(params).logits(x_BTD, in_place=True)

  def step(
    self, params: Any, inputs: Array, cache: Cache, rows: Rows
  ) -> tuple[Float32[Array, "B V"], Cache]:
    x_B1D, cache = self.forward(params, inputs[:, None], cache, rows)
    return self.logits(params, x_B1D)[:, 0], cache

  @property
  def weight_bytes(self) -> int:
    return sum(leaf.nbytes for leaf in self.params)


@dataclasses.dataclass(frozen=True, eq=False)
class FusedPrograms:
  """Runs `stage.fused`. The residual stream, and with it what passes between stages, is float32.

  Attributes:
    params: The weights.
    kernels: Which kernels run.
    dtype: Dtype of the cache, and of what passes between the kernels of a layer.
  """

  params: Fused
  kernels: Kernels
  dtype: np.dtype

  kind: Chosen = "fused"
  activations: np.dtype = np.dtype(np.float32)

  @property
  def rows_agree(self) -> bool:
    return self.kernels.invariant

  @property
  def lengths_agree(self) -> bool:
    return self.kernels.invariant

  def new_cache(self, *, slots: int, capacity: int) -> KVCache:
    return KVCache(*self.params.new_cache(batch=slots, capacity=capacity, dtype=self.dtype))

  def forward(
    self, params: Fused, inputs: Array, cache: KVCache, rows: Rows
  ) -> tuple[Float32[Array, "B T D"], KVCache]:
    x_BTD = inputs if params.embedding is None else fused.embed(params, inputs)
    caches = cache.k_LPKSH, cache.v_LPKSH
    if x_BTD.shape[1] > 1:
      # What padding leaves among keys and values is never read.
      x_BTD, *caches = fused.prefill(
        params, x_BTD, *caches, rows.start_B, slot_B=rows.slot_B,
        kernels=self.kernels, dtype=self.dtype,
      )  # fmt: skip
      return x_BTD, KVCache(*caches)
    x_BD, *caches = fused.decode(
      params, x_BTD[:, 0], *caches, _positions(rows), slot_B=rows.slot_B, kernels=self.kernels
    )
    return x_BD[:, None], KVCache(*caches)

  def step(
    self, params: Fused, inputs: Array, cache: KVCache, rows: Rows
  ) -> tuple[Float32[Array, "B V"], KVCache]:
    if not fused.has_token_kernel(params, inputs.shape[0], self.kernels):
      x_B1D, cache = self.forward(params, inputs[:, None], cache, rows)
      return fused.logits(params, x_B1D[:, 0], kernels=self.kernels), cache
    x_BD = inputs if params.embedding is None else fused.embed(params, inputs)
    # The kernel for a single token goes on through the head.
    _, logits_BV, *caches = fused.decode_one(
      params, x_BD, cache.k_LPKSH, cache.v_LPKSH, _positions(rows), rows.slot_B,
      kernels=self.kernels, head=True,
    )  # fmt: skip
    assert logits_BV is not None
    return logits_BV, KVCache(*caches)

  def logits(self, params: Fused, x_BTD: Float32[Array, "B T D"]) -> Float32[Array, "B T V"]:
    b, t, d = x_BTD.shape
    return fused.logits(params, x_BTD.reshape(b * t, d), kernels=self.kernels).reshape(b, t, -1)

  @property
  def weight_bytes(self) -> int:
    return self.params.nbytes


def _positions(rows: Rows) -> Array:
  """Where each row stores its token; nothing is stored at a position outside the cache."""
  return rows.start_B if rows.live_B is None else jnp.where(rows.live_B, rows.start_B, -1)


def rows_agree(model: NeuroLLM) -> bool:
  """Whether all matrices of a model give a row the same bits beside any number of other rows.

  Experts do not: which rows share one is decided by what all of them hold.
  """
  config, platform = model.config, _device().platform
  if config.num_experts:
    return False
  stacked = (
    params.get(nnx.to_pure_dict(nnx.state(model)), path)
    for stack in model.stacks.values()
    for _, path in params.stack_names(config, stack)
    if params.is_multiplied(path[-1])
  )
  head = [getattr(model, ends.head_name(config)).get_value()] if model.span.is_last else []
  return all(project.rows_agree(weight, platform) for weight in (*stacked, *head))


def programs_of(
  model: NeuroLLM,
  wanted: config.Programs = "auto",
  *,
  capacity: int,
  lengths: Sequence[int],
  cache: DTypeLike | None = None,
  kernels: Kernels | None = None,
  has_lone: bool = True,
) -> Programs:
  """Choose the programs that run a span. Fused programs consume the model.

  "auto" takes fused programs if the default device is a GPU of compute capability 9.0, the dtype is
  bfloat16, all matrices of the layers and the head are ternary, and the kernels take the shapes. Else
  the model runs as it is, and the log says why, once. The kernels are asked about all the layers of
  the model, so that every span of it runs by the same programs as the whole.

  Args:
    capacity: Positions of the cache.
    lengths: Input lengths that will be compiled.
    cache: Dtype of the cache; the model's if absent. Fused programs have no other yet.
    kernels: Kernels of the fused programs; those for the default device if absent. `REFERENCE` runs
      anywhere.
    has_lone: Whether a step of a single row may take the kernel for a single token, whose sums have an
      order of their own.
  Raises:
    ValueError: `wanted` is something else, or kernels are given for the model as it is.
    NotImplementedError: "fused" is wanted and cannot be had; names the reason.
  """
  if wanted not in get_args(config.Programs):
    raise ValueError(f"programs = {wanted!r}: choose one of {', '.join(get_args(config.Programs))}")
  if wanted == "model":
    if kernels is not None:
      raise ValueError(f"kernels {kernels} are for fused programs: leave them out, or want 'fused'")
    return ModelPrograms(model, cache)
  try:
    if cache is not None and jnp.dtype(cache) != model.dtype:
      raise NotImplementedError(f"they keep keys and values in {model.dtype}, not in {cache}")
    if wanted == "auto" or kernels is None or _needs_gpu(kernels):
      _check_gpu(model)
    kernels = _fitting(model, kernels, capacity, lengths, has_lone)
  except NotImplementedError as reason:
    if wanted == "fused":
      raise NotImplementedError(f"the fused programs cannot run this model: {reason}") from reason
    is_slow = _device().platform == "gpu" and _is_ternary(model)
    level = logging.WARNING if is_slow else logging.INFO
    _say(level, f"the model runs as it is, not by fused programs: {reason}")
    return ModelPrograms(model, cache)
  _say(logging.INFO, f"the model runs by fused programs, {kernels}")
  return FusedPrograms(fuse(model, consume=True), kernels, np.dtype(model.dtype))


def _fitting(
  model: NeuroLLM,
  kernels: Kernels | None,
  capacity: int,
  lengths: Sequence[int],
  has_lone: bool,
) -> Kernels:
  """Check that the kernels given, or the device's own, take the model.

  Raises: NotImplementedError: they do not; names the reason.
  """
  try:
    whole = _whole(model)
  except ValueError as error:
    raise NotImplementedError(str(error)) from error
  kernels = kernels or _of_device(whole, capacity, has_lone)
  programs = FusedPrograms(whole, kernels, np.dtype(model.dtype))
  cache = jax.eval_shape(lambda: programs.new_cache(slots=1, capacity=capacity))
  rows = Rows(jax.ShapeDtypeStruct((1,), jnp.int32))
  # Whatever a kernel does not take, it says when it is traced.
  for length in lengths:
    x_BTD = jax.ShapeDtypeStruct((1, length, model.config.model_dim), jnp.float32)
    ids_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)
    inputs = ids_BT if model.span.is_first else x_BTD
    jax.eval_shape(programs.forward, whole, inputs, cache, rows)
    if model.span.is_last:
      jax.eval_shape(programs.logits, whole, x_BTD)
  return kernels


def _whole(model: NeuroLLM) -> Fused:
  """The shapes of the fused span, with all the layers of the model in place of the span's."""
  graph, state = nnx.split(model)
  part = jax.eval_shape(lambda state: fuse(nnx.merge(graph, state)), state)
  layers = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((model.span.num_layers, *leaf.shape[1:]), leaf.dtype),
    part.layers,
  )
  return dataclasses.replace(part, layers=layers)


def _of_device(whole: Fused, capacity: int, has_lone: bool) -> Kernels:
  # A loop over layers, not unrolled: what XLA makes of a layer is then the same in every span.
  kernels = Kernels(device=_device().device_kind, invariant=True)
  if whole.layers.qkv.mode != "w2a8" or not has_lone:
    return kernels
  programs = _device().core_count
  if reason := decode.why_not(whole.layers, capacity, programs):
    _say(logging.INFO, f"no single kernel for a token: {reason}")
    return kernels
  return dataclasses.replace(kernels, programs=programs)


def _needs_gpu(kernels: Kernels) -> bool:
  is_compiled = kernels.programs > 0 and not kernels.interpret
  return is_compiled or (kernels.product, kernels.attention) != ("reference", "reference")


def why_not_fused(dtype: str) -> str | None:
  """Tell why fused programs cannot run on this device in a dtype; None if they can."""
  device = _device()
  if device.platform != "gpu":
    return f"their kernels are for GPUs, this is a {device.platform}"
  capability = str(getattr(device, "compute_capability", None))
  if capability != "9.0":
    return f"their kernels are for compute capability 9.0, {device.device_kind} has {capability}"
  if dtype != "bfloat16":
    return f"they compute in bfloat16, the dtype is {dtype}: choose that"
  return None


def _check_gpu(model: NeuroLLM) -> None:
  """Raises: NotImplementedError: `why_not_fused` has a reason."""
  if reason := why_not_fused(str(model.dtype)):
    raise NotImplementedError(reason)


def _device() -> jax.Device:
  return jax.devices()[0]


def _is_ternary(model: NeuroLLM) -> bool:
  leaves = jax.tree.leaves(nnx.state(model), is_leaf=lambda leaf: isinstance(leaf, TernaryArray))
  return any(isinstance(leaf, TernaryArray) for leaf in leaves)


@functools.cache
def _say(level: int, message: str) -> None:
  """Log a message, once in the life of the process."""
  log.log(level, message)

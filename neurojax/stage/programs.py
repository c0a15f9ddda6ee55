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
from jaxtyping import Array, Float, Float32, Int

from neurojax import config
from neurojax.kernels.decode import api as decode
from neurojax.model.cache import Cache, KVCache
from neurojax.model.neurollm import NeuroLLM
from neurojax.stage import fused
from neurojax.stage.fused import Fused, Kernels, fuse
from neurojax.weights.ternary import TernaryArray

log = logging.getLogger(__name__)

Chosen = Literal["model", "fused"]
"""One of `config.Programs` once "auto" is decided."""


@runtime_checkable
class Programs(Protocol):
  """Functions for a stage to compile, for one sequence at a time.

  Attributes:
    kind: "model" or "fused".
    params: All the weights, a tree of arrays; the first argument of every function.
    activations: Dtype of what passes from one stage to the next.
  """

  kind: Chosen
  params: Any
  activations: np.dtype

  def forward(
    self,
    params: Any,
    inputs: Array,
    cache: Cache,
    start_B: Int[Array, "1"],
    count_B: Int[Array, "1"] | None = None,
  ) -> tuple[Float[Array, "1 T D"], Cache]:
    """Run T inputs through the layers of the span.

    Args:
      inputs: int32 ids [1, T] if the span is the first, else activations [1, T, D].
      start_B: Position of the first input.
      count_B: How many inputs mean something, the rest being padding; all if absent.
    """
    ...

  def logits(self, params: Any, x_BTD: Float[Array, "1 T D"]) -> Float32[Array, "1 T V"]:
    """Compute logits by the final norm and the head, which only the last span has."""
    ...

  @property
  def weight_bytes(self) -> int:
    """Bytes of the weights; arrays that two parameters share count once."""
    ...


class ModelPrograms:
  """Runs the model as it is, on any device and with any weights; activations have the model's dtype."""

  kind: Chosen = "model"

  def __init__(self, model: NeuroLLM):
    graph, state = nnx.split(model)
    self.params, tree = jax.tree.flatten(state)
    self._rebuild = lambda leaves: nnx.merge(graph, jax.tree.unflatten(tree, leaves))
    self.activations = np.dtype(model.dtype)

  def forward(
    self,
    params: Any,
    inputs: Array,
    cache: Cache,
    start_B: Int[Array, "1"],
    count_B: Int[Array, "1"] | None = None,
  ) -> tuple[Float[Array, "1 T D"], Cache]:
    model = self._rebuild(params)
    x_BTD = model.embed(inputs) if model.span.is_first else inputs
    return model.run_layers(x_BTD, cache=cache, start_B=start_B, count_B=count_B)

  def logits(self, params: Any, x_BTD: Float[Array, "1 T D"]) -> Float32[Array, "1 T V"]:
    return self._rebuild(params).logits(x_BTD, in_place=True)

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

  def forward(
    self,
    params: Fused,
    inputs: Array,
    cache: KVCache,
    start_B: Int[Array, "1"],
    count_B: Int[Array, "1"] | None = None,
  ) -> tuple[Float32[Array, "1 T D"], KVCache]:
    # What padding leaves among keys and values is never read: nothing here needs count_B.
    x_BTD = inputs if params.embedding is None else fused.embed(params, inputs)
    caches = cache.k_LBKSH, cache.v_LBKSH
    if x_BTD.shape[1] > 1:
      x_BTD, *caches = fused.prefill(
        params, x_BTD, *caches, start_B, kernels=self.kernels, dtype=self.dtype
      )
      return x_BTD, KVCache(*caches)
    x_BD, *caches = fused.decode(params, x_BTD[:, 0], *caches, start_B, kernels=self.kernels)
    return x_BD[:, None], KVCache(*caches)

  def logits(self, params: Fused, x_BTD: Float32[Array, "1 T D"]) -> Float32[Array, "1 T V"]:
    return fused.logits(params, x_BTD[0], kernels=self.kernels)[None]

  @property
  def weight_bytes(self) -> int:
    return self.params.nbytes


def programs_of(
  model: NeuroLLM,
  wanted: config.Programs = "auto",
  *,
  capacity: int,
  lengths: Sequence[int],
  kernels: Kernels | None = None,
) -> Programs:
  """Choose the programs that run a span. Fused programs consume the model.

  "auto" takes fused programs if the default device is a GPU of compute capability 9.0, the dtype is
  bfloat16, all matrices of the layers and the head are ternary, and the kernels take the shapes. Else
  the model runs as it is, and the log says why, once. The kernels are asked about all the layers of
  the model, so that every span of it runs by the same programs as the whole.

  Args:
    capacity: Positions of the cache.
    lengths: Input lengths that will be compiled.
    kernels: Kernels of the fused programs; those for the default device if absent. `REFERENCE` runs
      anywhere.
  Raises:
    ValueError: `wanted` is something else, or kernels are given for the model as it is.
    NotImplementedError: "fused" is wanted and cannot be had; names the reason.
  """
  if wanted not in get_args(config.Programs):
    raise ValueError(f"programs = {wanted!r}: choose one of {', '.join(get_args(config.Programs))}")
  if wanted == "model":
    if kernels is not None:
      raise ValueError(f"kernels {kernels} are for fused programs: leave them out, or want 'fused'")
    return ModelPrograms(model)
  try:
    if wanted == "auto" or kernels is None or _needs_gpu(kernels):
      _check_gpu(model)
    kernels = _fitting(model, kernels, capacity, lengths)
  except NotImplementedError as reason:
    if wanted == "fused":
      raise NotImplementedError(f"the fused programs cannot run this model: {reason}") from reason
    is_slow = _device().platform == "gpu" and _is_ternary(model)
    level = logging.WARNING if is_slow else logging.INFO
    _say(level, f"the model runs as it is, not by fused programs: {reason}")
    return ModelPrograms(model)
  _say(logging.INFO, f"the model runs by fused programs, {kernels}")
  return FusedPrograms(fuse(model, consume=True), kernels, np.dtype(model.dtype))


def _fitting(
  model: NeuroLLM, kernels: Kernels | None, capacity: int, lengths: Sequence[int]
) -> Kernels:
  """Check that the kernels given, or the device's own, take the model.

  Raises: NotImplementedError: they do not; names the reason.
  """
  try:
    whole = _whole(model)
  except ValueError as error:
    raise NotImplementedError(str(error)) from error
  kernels = kernels or _of_device(whole, capacity)
  programs = FusedPrograms(whole, kernels, np.dtype(model.dtype))
  cache = jax.eval_shape(
    lambda: KVCache(*whole.new_cache(batch=1, capacity=capacity, dtype=model.dtype))
  )
  start_B = jax.ShapeDtypeStruct((1,), jnp.int32)
  # Whatever a kernel does not take, it says when it is traced.
  for length in lengths:
    x_BTD = jax.ShapeDtypeStruct((1, length, model.config.model_dim), jnp.float32)
    ids_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)
    inputs = ids_BT if model.span.is_first else x_BTD
    jax.eval_shape(programs.forward, whole, inputs, cache, start_B)
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


def _of_device(whole: Fused, capacity: int) -> Kernels:
  # A loop over layers, not unrolled: what XLA makes of a layer is then the same in every span.
  kernels = Kernels(device=_device().device_kind)
  if whole.layers.qkv.mode != "w2a8":
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

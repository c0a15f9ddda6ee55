"""Loads the parameters of a span of layers from a model file."""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from neurojax.config import Span
from neurojax.files.kept import stored_forms, ternary_matrices
from neurojax.files.model_file import ModelFile
from neurojax.forms import Form, Grouped, Plain, Scales, Weights
from neurojax.model import params
from neurojax.model.neurollm import NeuroLLM
from neurojax.weights.build import Source, build
from neurojax.weights.rows import TernaryRows

_ALIGNMENT = 64
_AT_ONCE = 2
"""Number of tensors of a layer that are read at once: one is copied while the other is unpacked."""
_ROWS_AT_ONCE = 64
_PLAIN = {form.dtype: form for form in (Plain("float16"), Plain("bfloat16"))}


def load_span(
  file: ModelFile,
  span: Span | None = None,
  *,
  dtype: DTypeLike = jnp.float32,
  weights: Weights = "dense",
  progress: Callable[[int], None] | None = None,
) -> NeuroLLM:
  """Reads the tensors of `span` and nothing else.

  Args:
    span: The layers; None: all.
    dtype: Dtype of activations, cache and norms, and of dense matrices.
    weights: "w2a16" and "w2a8" keep the matrices that `ternary_matrices` lists packed, without any
      change, and the others dense; "stored" keeps all that `stored_forms` lists.
    progress: Called with the number of layers read so far.
  Raises: ValueError: a tensor does not have the configuration's shape, or holds NaN or infinity; the
    file has no ternary matrix to keep; and whatever the file's reader raises.
  """
  config = file.config
  span = span or Span.whole(config)
  form_of = _forms(file, dtype, weights)
  graph, state = nnx.split(NeuroLLM.abstract(config, span=span, dtype=dtype))
  shapes = nnx.to_pure_dict(state)
  pure: dict[str, Any] = {}

  def read(name: str, layer: int | None, shape: tuple[int, ...]) -> Any:
    form = form_of(name, layer)
    source = _source(file, name, layer, form, shape)
    if form is None:
      assert isinstance(source, np.ndarray)
      return source.astype(dtype)
    experts, own_shape = None, shape
    if params.is_expert(name):
      experts, *own_shape = shape
    mode = "w2a8" if weights == "w2a8" else "w2a16"
    axes = params.contracted(name)
    return build(form, source, tuple(own_shape), axes, experts=experts, mode=mode)

  for name, path in params.outer_names(config, span):
    value = read(name, None, params.get(shapes, path).shape)
    params.put(pure, path, jax.tree.map(jax.device_put, value))
  done = 0
  for stack in params.stacks(config, span):
    paths = dict(params.stack_names(config, stack))
    stacked = _Stacked(len(stack.layers))

    def one(place: int, layer: int, name: str, stacked=stacked, paths=paths) -> None:
      shape = params.get(shapes, paths[name]).shape[1:]
      stacked.put(name, place, read(name, layer, shape))

    with ThreadPoolExecutor(_AT_ONCE) as threads:
      for place, layer in enumerate(stack.layers):
        for _ in threads.map(functools.partial(one, place, layer), paths):
          pass
        done += 1
        if progress:
          progress(done)
    for name, path in paths.items():
      params.put(pure, path, stacked.pop(name))
  nnx.replace_by_pure_dict(state, pure)
  return nnx.merge(graph, state)


def _forms(
  file: ModelFile, dtype: DTypeLike, weights: Weights
) -> Callable[[str, int | None], Form | Literal["int8"] | None]:
  """Returns a function from name and layer to the form to hold; None: numbers of `dtype`."""
  kept = _kept(file, weights)
  plain = _PLAIN.get(jnp.dtype(dtype).name)

  def form_of(name: str, layer: int | None) -> Form | Literal["int8"] | None:
    if name in kept or not params.is_matrix(name):
      return kept.get(name)
    if weights == "int8":
      return "int8"
    # Numbers that the file has in this very dtype are read without float32 in between.
    return plain if plain is not None and file.narrow_form(name, layer) == plain else None

  return form_of


def _kept(file: ModelFile, weights: Weights) -> Mapping[str, Form]:
  """The forms of matrices that are kept as they are in the file, by name."""
  if weights == "stored":
    return stored_forms(file)
  if weights not in ("w2a16", "w2a8"):
    return {}
  if found := ternary_matrices(file):
    return found
  kinds = ", ".join(sorted({info.type for info in file.tensors.values()}))
  raise ValueError(
    f"{file.path}: weights = {weights!r}, and no matrix of the file is ternary ({kinds}): choose"
    " 'dense' or 'int8', or 'stored'"
  )


def _source(
  file: ModelFile,
  name: str,
  layer: int | None,
  form: Form | Literal["int8"] | None,
  shape: tuple[int, ...],
) -> Source:
  """Reads a tensor as `weights.build.build` takes it; plain numbers are checked."""
  match form:
    case Scales():
      return TernaryRows(*file.read_ternary(name, layer))
    case Grouped():
      return file.read_grouped(name, layer)
    case Plain():
      numbers = file.read_plain(name, layer)
    case _:
      numbers = file.read(name, layer)
  where = f"{file.path}: {name}" + ("" if layer is None else f" of layer {layer}")
  if numbers.shape != shape:
    raise ValueError(f"{where} has shape {numbers.shape}, the configuration wants {shape}")
  if not _is_finite(numbers):
    raise ValueError(f"{where} holds NaN or infinity: the file is damaged, get it again")
  return numbers


def _is_finite(array: np.ndarray) -> bool:
  exponent = {"float16": 0x7C00, "bfloat16": 0x7F80}.get(array.dtype.name)
  if exponent is None:
    return bool(np.isfinite(array).all())
  # Integer operations take a quarter of the time of isfinite here.
  return bool(((array.view(np.uint16) & np.uint16(exponent)) != exponent).all())


class _Stacked:
  """The parameters of a stack of layers, by name, filled layer by layer."""

  def __init__(self, layers: int):
    self._layers = layers
    self._whole: dict[str, Any] = {}

  def put(self, name: str, place: int, value: Any) -> None:
    if name not in self._whole:
      self._whole[name] = jax.tree.map(functools.partial(_buffer, self._layers), value)
    for whole, leaf in zip(*map(jax.tree.leaves, (self._whole[name], value)), strict=True):
      _copy(whole[place, ...], np.asarray(leaf))

  def pop(self, name: str) -> Any:
    """Takes a parameter out, on the default device; the host's memory is freed if that is another."""
    return jax.tree.map(jax.device_put, self._whole.pop(name))


def _copy(into: np.ndarray, leaf: np.ndarray) -> None:
  """Copies a leaf whose axes may be swapped: `into[...] = leaf`.

  A few rows are copied at a time: each row alone would touch all of `into`.
  """
  if leaf.flags.c_contiguous or leaf.ndim < 2:
    into[...] = leaf
    return
  slowest = int(np.argmax(leaf.strides))
  run = leaf.shape[int(np.argmin(leaf.strides))]
  rows = leaf.size // run // leaf.shape[slowest]
  source, target = np.moveaxis(leaf, slowest, 0), np.moveaxis(into, slowest, 0)
  step = max(1, _ROWS_AT_ONCE // max(1, rows))
  for first in range(0, len(source), step):
    target[first : first + step] = source[first : first + step]


def _buffer(layers: int, leaf: Any) -> np.ndarray:
  """Allocates room for a leaf of each layer, aligned so that XLA:CPU takes it over without a copy."""
  nbytes = layers * leaf.nbytes
  room = np.empty(nbytes + _ALIGNMENT, np.uint8)
  start = -room.ctypes.data % _ALIGNMENT
  return room[start : start + nbytes].view(leaf.dtype).reshape(layers, *leaf.shape)

"""Exact bytes of a model's parts, and the FLOPs of a token. Imports no JAX."""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal

from neurojax.config import LayerKind, ModelConfig, Span

Weights = Literal["dense", "int8", "w2a16", "w2a8", "stored"]
"""How matrices are held: "dense" in the compute dtype, "int8" as integers with scales; "w2a16" and
"w2a8" keep a file's ternary ones packed, for activations as they are or rounded to int8, and the
others dense; "stored" keeps every one as its file has it, exactly, where that is narrower."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

KEY_BLOCK = 128
"""Attention reads the cache in blocks of this many positions; a capacity is a multiple of it."""

MOST_INPUTS = 256
"""Inputs of one call that a cache of a layer with a window has room for, beside the window."""


@dataclasses.dataclass(frozen=True)
class Scales:
  """How the scales of a ternary matrix lie: one for each `group_size` contracted elements of an
  output, or one for the matrix (of each layer) if that is None; `scale_bytes` each."""

  group_size: int | None
  scale_bytes: int

  def matrix_bytes(self, contracted: int, output: int) -> int:
    # ternary.array.TernaryArray: 16 bytes of codes for each 64 elements of a row.
    codes = output * -(-contracted // 64) * 16
    groups = 1 if self.group_size is None else output * -(-contracted // self.group_size)
    return codes + groups * self.scale_bytes


PARENT = 256
"""Contracted elements whose groups' scales are multiples of one, see `Grouped.parent`."""

_PLANES: Mapping[int, tuple[tuple[int, ...], ...]] = {
  8: (), 6: ((4, 2),), 5: ((4, 1), (4, 2)), 4: ((4,),), 3: ((2, 1), (4,)), 2: ((2,), (4,)),
  1: ((1,), (2,), (4,)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
  """How a matrix of small integers lies, `group_size` contracted elements of an output to a scale:

    w = scale * (code - offset) [+ minimum]    or    w = scale * (code - offset - zero)

  Attributes:
    bits: Of a code: 1 to 8 except 7.
    offset: What stands for zero.
    scale: The dtype of a scale, and of a minimum.
    parent: Whether a group has an int8 factor in its place (uint8 for minima), and PARENT elements
      have the scale that it multiplies.
    minima: Whether a group has a minimum, a zero (uint8), or none.
    float8: Codes of 8 bits that are floating-point numbers of that kind, not integers.
  """

  bits: int
  offset: int
  group_size: int
  scale: Literal["float16", "float32"]
  parent: bool = False
  minima: Literal["none", "minimum", "zero"] = "none"
  float8: Literal["none", "e4m3", "e5m2"] = "none"

  def planes(self, contracted: int) -> tuple[int, ...]:
    """Bits of each plane that a row's codes are cut into: the lowest bits are in the first. A byte of
    a plane holds codes that are apart by an equal part of the row, and every part has whole groups;
    rows for which that does not come out are kept in more bits, at worst as bytes."""
    for planes in _PLANES[self.bits]:
      if contracted % (8 // min(planes) * self.group_size) == 0:
        return planes
    return (8,)

  def matrix_bytes(self, contracted: int, output: int) -> int:
    row = sum(contracted * bits // 8 for bits in self.planes(contracted))
    scales = 2 if self.minima == "minimum" else 1
    groups = contracted // self.group_size
    if self.parent:
      row += scales * (groups + contracted // PARENT * DTYPE_BYTES[self.scale])
    else:
      row += scales * groups * DTYPE_BYTES[self.scale]
    return output * (row + (groups if self.minima == "zero" else 0))

  def join(self, other: "Grouped") -> "Grouped | None":
    """The narrowest form that has room for matrices of both, exactly; None: there is none."""
    if self == other:
      return self
    if (self.float8, other.float8) != ("none", "none"):
      return None
    group_size = math.gcd(self.group_size, other.group_size)
    bits, offset = 8, 128
    if "zero" not in (self.minima, other.minima):
      offset = max(self.offset, other.offset)
      most = max((1 << form.bits) - form.offset for form in (self, other)) + offset
      bits = next(b for b in sorted(_PLANES) if 1 << b >= most)
    parent = self.parent and other.parent
    same = self.scale == other.scale and self.parent == other.parent
    return Grouped(
      bits=bits,
      offset=offset,
      group_size=group_size,
      scale=self.scale if same else "float32",
      parent=parent,
      minima="minimum" if "minimum" in (self.minima, other.minima) else "none",
    )


@dataclasses.dataclass(frozen=True)
class Plain:
  """A matrix of plain numbers that are narrower than those computed with, or as wide."""

  dtype: Literal["float16", "bfloat16"]

  def matrix_bytes(self, contracted: int, output: int) -> int:
    return contracted * output * DTYPE_BYTES[self.dtype]


Form = Scales | Grouped | Plain

Ternary = Mapping[str, Form]
"""What matrices are in a file, by canonical name, where that is narrow; `files.load.stored_forms`
tells. Those with `Scales` are ternary."""


TERNARY_FORMATS: Mapping[str, Scales] = {
  "ternary-g64": Scales(64, 2),
  "ternary-g128": Scales(128, 2),
  "ternary-g256": Scales(256, 2),
  "ternary-tensor": Scales(None, 4),
  "Q2_0 (group 64)": Scales(64, 2),
  "Q2_0 (group 128)": Scales(128, 2),
  "PQ2_0": Scales(128, 2),
  "TQ1_0": Scales(256, 2),
  "TQ2_0": Scales(256, 2),
  "I2_S": Scales(None, 4),
}
"""Scales by the name of a format, those of files (`ternary.codecs`) too. Every one of them is two-bit
codes on the device, whatever its file holds: TQ1_0's 1.69 bits become 2.06 there."""


def capacity_for(context_length: int) -> int:
  """Cache positions allocated for a context: the next multiple of KEY_BLOCK."""
  return -(-context_length // KEY_BLOCK) * KEY_BLOCK


def kept_positions(capacity: int, window: int | None) -> int:
  """Of a cache of `capacity` positions, those kept in a layer with a window: its keys, and a call's new
  ones."""
  return capacity if window is None else min(capacity, capacity_for(window + MOST_INPUTS))


def layer_matrices(config: ModelConfig, layer: int | None = None) -> dict[str, tuple[int, int]]:
  """(contracted, output) elements of each matrix of one layer that may be held narrow.

  Those of experts stand together, with the outputs of all.

  Args:
    layer: Its number; None, here and below: one of those that take most, if not all are alike.
  """
  parts = _matrices(config, _kind(config, layer))
  return {name: (contracted, output * copies) for name, contracted, output, copies in parts}


def parameters(config: ModelConfig) -> int:
  """Parameters of the whole model."""
  outer = config.vocab_size * config.model_dim * (1 if config.tied_embedding else 2)
  layers = sum(
    number * _kind_parameters(config, kind)
    for kind, number in _kinds(config, Span.whole(config)).items()
  )
  return layers + outer + config.model_dim


def layer_bytes(
  config: ModelConfig,
  *,
  dtype: str,
  weights: Weights,
  ternary: Ternary | None = None,
  layer: int | None = None,
) -> int:
  """Bytes of one layer's parameters.

  Args:
    ternary: Needed, here and below, if `weights` keeps ternary matrices packed.
  Raises: ValueError: it is needed and absent.
  """
  return _kind_bytes(config, _kind(config, layer), dtype, weights, ternary)


def embedding_bytes(
  config: ModelConfig, *, dtype: str, weights: Weights, ternary: Ternary | None = None
) -> int:
  """Bytes of the token embedding (which serves as the head too, where they are tied)."""
  form = _form("embedding_VD", weights, ternary)
  return _matrix_bytes(config.model_dim, config.vocab_size, dtype, weights, form)


def head_bytes(
  config: ModelConfig, *, dtype: str, weights: Weights, ternary: Ternary | None = None
) -> int:
  """Bytes of the matrix that gives the logits: the embedding, where they are tied."""
  name = "embedding_VD" if config.tied_embedding else "head_DV"
  form = _form(name, weights, ternary)
  return _matrix_bytes(config.model_dim, config.vocab_size, dtype, weights, form)


def span_bytes(
  config: ModelConfig,
  span: Span,
  *,
  dtype: str,
  weights: Weights,
  ternary: Ternary | None = None,
) -> int:
  """Bytes of the parameters of a stage: its layers, embedding if first, norm and head if last."""
  total = sum(
    number * _kind_bytes(config, kind, dtype, weights, ternary)
    for kind, number in _kinds(config, span).items()
  )
  if span.is_first:
    total += embedding_bytes(config, dtype=dtype, weights=weights, ternary=ternary)
  if span.is_last:
    total += config.model_dim * DTYPE_BYTES[dtype]
    if not (span.is_first and config.tied_embedding):
      total += head_bytes(config, dtype=dtype, weights=weights, ternary=ternary)
  return total


def cache_bytes(config: ModelConfig, num_layers: int, *, capacity: int, dtype: str) -> int:
  """Bytes of one sequence's keys and values, or states of convolutions, over `num_layers` layers: those
  that take most, if not all are alike and fewer than all are asked about."""
  if num_layers == config.num_layers:
    return span_cache_bytes(config, Span.whole(config), capacity=capacity, dtype=dtype)
  kinds = config.layer_kinds or (_alike(config.sliding_window),)
  return num_layers * max(_kind_cache_bytes(config, kind, capacity, dtype) for kind in kinds)


def span_cache_bytes(config: ModelConfig, span: Span, *, capacity: int, dtype: str) -> int:
  """Bytes of what one sequence leaves in the layers of a stage."""
  return sum(
    number * _kind_cache_bytes(config, kind, capacity, dtype)
    for kind, number in _kinds(config, span).items()
  )


def span_parameters(config: ModelConfig, span: Span) -> int:
  """Parameters that a stage holds. Over a cut, a tied embedding is held by both ends."""
  return span_bytes(config, span, dtype="float32", weights="dense") // DTYPE_BYTES["float32"]


def uniform_ternary(config: ModelConfig, scales: Scales) -> Ternary:
  """Every matrix of the model ternary alike, embedding and head too."""
  outer = ("embedding_VD",) if config.tied_embedding else ("embedding_VD", "head_DV")
  inner = [name for kind in config.kinds for name, *_ in _matrices(config, kind)]
  return dict.fromkeys((*inner, *outer), scales)


def flops_per_token(
  config: ModelConfig,
  *,
  context: int,
  mode: Literal["prefill", "decode", "train"],
  span: Span | None = None,
) -> int:
  """Floating-point operations of one token: what the arithmetic needs, exactly.

  A multiply-add counts as 2. Counted are the products with matrices and attention's two products
  (scores, weighted values) over the keys a query may see, a short convolution, and of experts the
  chosen ones with the router; norms, rotations, softmax, activations and the embedding's lookup are
  not (below 1% of it at usual widths). Where a window makes the mean of keys no whole number, the
  result is rounded down.

    decode   the token sees `context` keys, itself included; the head once
    prefill  mean of `context` positions, which see (context + 1) / 2 keys; no head, which a prompt
             needs once: add `head_flops`
    train    3 times the forward pass: mean keys as in prefill, the head for every token. The
             backward pass multiplies each matrix twice; rematerializing layers adds a fourth pass

  Implementations that compute masked scores too do up to twice the work of attention.

  Args:
    span: Of a stage; the whole model if absent.
  Raises: ValueError: a context below 1.
  Source: the convention is that of Hoffmann et al., arXiv:2203.15556, appendix F, without the
    operations it counts for softmax and with the lookup free.
  """
  if context < 1:
    raise ValueError(f"context = {context}: at least the token itself, 1")
  span = span or Span.whole(config)
  layers = sum(
    number * _kind_flops(config, kind, context, mode == "decode")
    for kind, number in _kinds(config, span).items()
  )
  head = head_flops(config) if span.is_last and mode != "prefill" else 0
  return (3 if mode == "train" else 1) * (layers + head)


def head_flops(config: ModelConfig) -> int:
  """Floating-point operations of the logits of one position."""
  return 2 * config.model_dim * config.vocab_size


@functools.cache
def _alike(sliding_window: int | None) -> LayerKind:
  """The kind of all layers that are of one."""
  return LayerKind(sliding_window=sliding_window)


def _kinds(config: ModelConfig, span: Span) -> dict[LayerKind, int]:
  """How many layers of a span are of each kind, as the configuration has them."""
  if not config.layer_kinds:
    return {_alike(config.sliding_window): len(span)}
  layers = range(span.first_layer, span.last_layer + 1)
  return collections.Counter(config.layer_kinds[config.kind_index(layer)] for layer in layers)


def _kind(config: ModelConfig, layer: int | None) -> LayerKind:
  if not config.layer_kinds:
    return _alike(config.sliding_window)
  if layer is not None:
    return config.layer_kinds[config.kind_index(layer)]
  return max(config.layer_kinds, key=lambda kind: _kind_parameters(config, kind))


def _heads(config: ModelConfig, kind: LayerKind) -> tuple[int, int]:
  """Key-value heads, and the width of a head."""
  return kind.num_kv_heads or config.num_kv_heads, kind.head_dim or config.head_dim


def _matrices(config: ModelConfig, kind: LayerKind) -> list[tuple[str, int, int, int]]:
  """Name, contracted and output elements, and how many of that shape."""
  d, f, e = config.model_dim, config.ffn_dim, config.num_experts
  if kind.mixer == "convolution":
    found = [("conv_in_DC", d, 3 * d, 1), ("conv_out_MD", d, d, 1)]
  else:
    k, h = _heads(config, kind)
    found = [("q_DNH", d, config.num_heads * h, 1), ("k_DKH", d, k * h, 1)]
    if not kind.shared_kv:
      found.append(("v_DKH", d, k * h, 1))
    found.append(("o_NHD", config.num_heads * h, d, 1))
  if e:
    return [*found, ("gate_EDF", d, f, e), ("up_EDF", d, f, e), ("down_EFD", f, d, e)]
  return [*found, ("gate_DF", d, f, 1), ("up_DF", d, f, 1), ("down_FD", f, d, 1)]


def _vectors(config: ModelConfig, kind: LayerKind) -> int:
  """Elements of a layer's other parameters: norms, biases, kernels, scales, and a router."""
  d, n = config.model_dim, config.num_heads
  total = (4 if config.post_norm else 2) * d + d * config.num_experts
  total += (config.ffn_dim if config.sub_norm else 0) + (1 if config.layer_scale else 0)
  if kind.mixer == "convolution":
    return total + config.conv_width * d
  k, h = _heads(config, kind)
  total += 2 * h if config.qk_norm else 0
  total += n * h if config.sub_norm else 0
  return total + ((n + (1 if kind.shared_kv else 2) * k) * h if config.qkv_bias else 0)


def _kind_parameters(config: ModelConfig, kind: LayerKind) -> int:
  matrices = sum(k * n * copies for _, k, n, copies in _matrices(config, kind))
  return matrices + _vectors(config, kind)


def _kind_bytes(
  config: ModelConfig, kind: LayerKind, dtype: str, weights: Weights, ternary: Ternary | None
) -> int:
  matrices = sum(
    copies * _matrix_bytes(k, n, dtype, weights, _form(name, weights, ternary))
    for name, k, n, copies in _matrices(config, kind)
  )
  return matrices + _vectors(config, kind) * DTYPE_BYTES[dtype]


def _kind_cache_bytes(config: ModelConfig, kind: LayerKind, capacity: int, dtype: str) -> int:
  if kind.mixer == "convolution":
    return (config.conv_width - 1) * config.model_dim * DTYPE_BYTES[dtype]
  k, h = _heads(config, kind)
  return 2 * k * kept_positions(capacity, kind.sliding_window) * h * DTYPE_BYTES[dtype]


def _kind_flops(config: ModelConfig, kind: LayerKind, context: int, at_end: bool) -> int:
  """Of one layer and token, which sees what the `context`-th does, or the mean of as many."""
  active = config.experts_per_token or 1
  total = sum(
    2 * k * n * (active if copies > 1 else 1) for _, k, n, copies in _matrices(config, kind)
  )
  total += 2 * config.model_dim * config.num_experts
  if kind.mixer == "convolution":
    return total + 2 * config.conv_width * config.model_dim
  most = min(context, kind.sliding_window or context)
  # Of all positions, twice: a triangle of the first `most`, then a band.
  keys = 2 * most * context if at_end else most * (2 * context - most + 1)
  return total + 2 * config.num_heads * _heads(config, kind)[1] * keys // context


def _form(name: str, weights: Weights, ternary: Ternary | None) -> Form | None:
  """That of a matrix that is held as its file has it, else None."""
  if weights in ("dense", "int8"):
    return None
  if ternary is None:
    raise ValueError(
      f"weights = {weights!r}: what the matrices of the file are is not said: see"
      " files.load.stored_forms"
    )
  if weights == "stored":
    return ternary.get(name)
  packed = {name: form for name, form in ternary.items() if isinstance(form, Scales)}
  if not packed:
    raise ValueError(
      f"weights = {weights!r}: no matrix of the file is ternary: choose 'dense' or 'int8', or 'stored'"
    )
  return packed.get(name)


def _matrix_bytes(
  contracted: int, output: int, dtype: str, weights: Weights, form: Form | None = None
) -> int:
  if form is not None:
    return form.matrix_bytes(contracted, output)
  if weights != "int8":
    return contracted * output * DTYPE_BYTES[dtype]
  # quant.array.Int8Array: outputs in lanes of 4, a float32 scale for each, one float32 for all.
  rows = -(-output // 4) * 4
  return rows * contracted + 4 * rows + 4

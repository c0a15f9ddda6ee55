"""Counts the exact bytes of a model's parts, and the FLOPs of a token."""

import collections
import functools
from typing import Literal

from neurojax.config import LayerKind, ModelConfig, Span
from neurojax.forms import DTYPE_BYTES, Form, Forms, Scales, Weights, kept_positions


def layer_matrices(config: ModelConfig, layer: int | None = None) -> dict[str, tuple[int, int]]:
  """Contracted and output elements, by name, of each matrix of one layer that may be held narrow.

  Matrices of experts count as one, with the outputs of all.

  Args:
    layer: Number of the layer; None, here and below, takes a layer of the largest kind.
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
  forms: Forms | None = None,
  layer: int | None = None,
) -> int:
  """Bytes of one layer's parameters.

  Args:
    forms: Forms of the file's matrices. Needed, here and below, if `weights` keeps any of them.
  Raises: ValueError: it is needed and absent.
  """
  return _kind_bytes(config, _kind(config, layer), dtype, weights, forms)


def embedding_bytes(
  config: ModelConfig, *, dtype: str, weights: Weights, forms: Forms | None = None
) -> int:
  """Bytes of the token embedding (which serves as the head too, where they are tied)."""
  form = _form("embedding_VD", weights, forms)
  return _matrix_bytes(config.model_dim, config.vocab_size, dtype, weights, form)


def head_bytes(
  config: ModelConfig, *, dtype: str, weights: Weights, forms: Forms | None = None
) -> int:
  """Bytes of the matrix that gives the logits: the embedding, where they are tied."""
  name = "embedding_VD" if config.tied_embedding else "head_DV"
  form = _form(name, weights, forms)
  return _matrix_bytes(config.model_dim, config.vocab_size, dtype, weights, form)


def span_bytes(
  config: ModelConfig,
  span: Span,
  *,
  dtype: str,
  weights: Weights,
  forms: Forms | None = None,
) -> int:
  """Bytes of the parameters of a stage: its layers, embedding if first, norm and head if last."""
  total = sum(
    number * _kind_bytes(config, kind, dtype, weights, forms)
    for kind, number in _kinds(config, span).items()
  )
  if span.is_first:
    total += embedding_bytes(config, dtype=dtype, weights=weights, forms=forms)
  if span.is_last:
    total += config.model_dim * DTYPE_BYTES[dtype]
    if not (span.is_first and config.tied_embedding):
      total += head_bytes(config, dtype=dtype, weights=weights, forms=forms)
  return total


def cache_bytes(config: ModelConfig, num_layers: int, *, capacity: int, dtype: str) -> int:
  """Bytes of the cache of one sequence (keys and values, or states of convolutions) in `num_layers` layers.

  If layers differ and not all of them are asked about, the largest kind counts for each."""
  if num_layers == config.num_layers:
    return span_cache_bytes(config, Span.whole(config), capacity=capacity, dtype=dtype)
  kinds = config.layer_kinds or (_alike(config.sliding_window),)
  return num_layers * max(_kind_cache_bytes(config, kind, capacity, dtype) for kind in kinds)


def span_cache_bytes(config: ModelConfig, span: Span, *, capacity: int, dtype: str) -> int:
  """Bytes of the cache of one sequence in the layers of a stage."""
  return sum(
    number * _kind_cache_bytes(config, kind, capacity, dtype)
    for kind, number in _kinds(config, span).items()
  )


def span_parameters(config: ModelConfig, span: Span) -> int:
  """Parameters that a stage holds. If a model is cut, both ends hold a tied embedding."""
  return span_bytes(config, span, dtype="float32", weights="dense") // DTYPE_BYTES["float32"]


def uniform_ternary(config: ModelConfig, scales: Scales) -> Forms:
  """Forms of a model in which every matrix is ternary with the same scales, embedding and head too."""
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

  A multiply-add counts as 2. The count has the products with matrices, attention's two products
  (scores, weighted values) over the keys that a query may see, short convolutions, and the chosen
  experts with their router. It leaves out norms, rotations, softmax, activations and the lookup in the
  embedding (below 1% at usual widths). Where a window makes the mean number of keys no whole number, the
  result is rounded down.

    decode   the token sees `context` keys, itself included; the head once
    prefill  mean of `context` positions, which see (context + 1) / 2 keys; no head, which a prompt
             needs once: add `head_flops`
    train    3 times the forward pass: mean keys as in prefill, the head for every token. The
             backward pass multiplies each matrix twice; rematerializing layers adds a fourth pass

  Implementations that compute masked scores too do up to twice the work of attention.

  Args:
    context: Positions, as above.
    mode: "prefill", "decode" or "train", as above.
    span: Layers of a stage; the whole model if absent.
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
  """The layer kind of a model whose layers are all alike."""
  return LayerKind(sliding_window=sliding_window)


def _kinds(config: ModelConfig, span: Span) -> dict[LayerKind, int]:
  """The number of layers of each kind in a span."""
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
  """Name, contracted elements, output elements and number of copies of each matrix of a layer kind."""
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
  """Elements of a layer's other parameters: norms, biases, convolution kernels, scales and router."""
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
  config: ModelConfig, kind: LayerKind, dtype: str, weights: Weights, forms: Forms | None
) -> int:
  matrices = sum(
    copies * _matrix_bytes(k, n, dtype, weights, _form(name, weights, forms))
    for name, k, n, copies in _matrices(config, kind)
  )
  return matrices + _vectors(config, kind) * DTYPE_BYTES[dtype]


def _kind_cache_bytes(config: ModelConfig, kind: LayerKind, capacity: int, dtype: str) -> int:
  if kind.mixer == "convolution":
    held = "float32" if dtype == "int8" else dtype
    return (config.conv_width - 1) * config.model_dim * DTYPE_BYTES[held]
  k, h = _heads(config, kind)
  # With int8 each position and head has a float32 factor.
  head = h + DTYPE_BYTES["float32"] if dtype == "int8" else h * DTYPE_BYTES[dtype]
  return 2 * k * kept_positions(capacity, kind.sliding_window) * head


def _kind_flops(config: ModelConfig, kind: LayerKind, context: int, at_end: bool) -> int:
  """FLOPs of one token in a layer: at position `context` if `at_end`, else the mean over positions up to it."""
  active = config.experts_per_token or 1
  total = sum(
    2 * k * n * (active if copies > 1 else 1) for _, k, n, copies in _matrices(config, kind)
  )
  total += 2 * config.model_dim * config.num_experts
  if kind.mixer == "convolution":
    return total + 2 * config.conv_width * config.model_dim
  most = min(context, kind.sliding_window or context)
  # Twice the keys of all positions: a triangle of the first `most`, then a band.
  keys = 2 * most * context if at_end else most * (2 * context - most + 1)
  return total + 2 * config.num_heads * _heads(config, kind)[1] * keys // context


def _form(name: str, weights: Weights, forms: Forms | None) -> Form | None:
  """The form of a matrix that is held as its file has it; None for one that is not."""
  if weights in ("dense", "int8"):
    return None
  if forms is None:
    raise ValueError(
      f"weights = {weights!r}: the forms of the file's matrices are not given: see"
      " files.kept.stored_forms"
    )
  if weights == "stored":
    return forms.get(name)
  packed = {name: form for name, form in forms.items() if isinstance(form, Scales)}
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
  # weights.int8.Int8Array: outputs in lanes of 4, a float32 scale for each, one float32 for all.
  rows = -(-output // 4) * 4
  return rows * contracted + 4 * rows + 4

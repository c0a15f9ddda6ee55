"""Counts the memory of a training step."""

import dataclasses
from typing import Literal

from neurojax import count
from neurojax.config import ModelConfig, Span
from neurojax.count.working import DeviceKind
from neurojax.forms import DTYPE_BYTES

Optimizer = Literal["adamw", "muon", "sgd"]

_MASTER = DTYPE_BYTES["float32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBytes:
  """Bytes of one host in a training step.

  Attributes:
    parameters: Master weights, float32.
    copy: Weights in the compute dtype, which the step multiplies by; 0 if that is float32. XLA:CPU narrows
      and widens them in passing: only copies of embedding and head remain.
    gradients: Gradients of the master weights, float32.
    optimizer: State of the optimizer, see `optimizer_bytes`.
    activations: Activations that the forward pass keeps for the backward one.
    working: Working memory at the peak: a layer's backward pass, the logits, or the update of one array.
    diloco: Snapshot and outer velocity of a DiLoCo worker, float32.
  """

  parameters: int
  copy: int
  gradients: int
  optimizer: int
  activations: int
  working: int
  diloco: int

  @property
  def total(self) -> int:
    return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def train_bytes(
  config: ModelConfig,
  span: Span,
  *,
  batch: int,
  sequence: int,
  optimizer: Optimizer = "adamw",
  remat: bool = True,
  compute_dtype: str = "bfloat16",
  diloco: bool = False,
  kind: DeviceKind = "cuda",
) -> TrainBytes:
  """Memory of a stage that trains its span: master weights in float32, products in `compute_dtype`.

  Quantization-aware training takes the same: its ternary weights are values of the compute copy.
  Parameters and optimizer are exact. The rest depends on XLA: on the architectures of the tests the total
  is within 5% of what XLA reports for the compiled step, on a CPU, in float32 and in bfloat16; from jax
  0.11 on a CPU takes up to a third less in bfloat16. Doubt: on GPUs, where other attention is chosen,
  nothing was compared.

  Args:
    batch: Sequences whose activations are kept at once. A pipeline with m micro-batches in flight
      keeps those of m: pass all their sequences.
    sequence: Tokens of each sequence.
    optimizer: As in `optimizer_bytes`.
    remat: The backward pass computes the activations of each layer again; only inputs of layers are kept.
    compute_dtype: Dtype of products and activations.
    diloco: Add the snapshot and the outer momentum of arXiv:2311.08105, algorithm 1.
    kind: Kind of the device. XLA:CPU computes bfloat16 as float32, and keeps activations so.
  Raises: ValueError: a batch or sequence below 1.
  """
  if batch < 1 or sequence < 1:
    raise ValueError(f"batch = {batch}, sequence = {sequence}: both must be positive")
  parameters = count.span_parameters(config, span)
  widens = kind == "cpu" and compute_dtype != "float32"
  c, tokens = DTYPE_BYTES["float32" if widens else compute_dtype], batch * sequence
  layer = _layer_bytes(config, sequence, c) * tokens
  kept = config.model_dim * c * tokens if remat else layer
  return TrainBytes(
    parameters=parameters * _MASTER,
    copy=_copy_bytes(config, span, compute_dtype, widens),
    gradients=parameters * _MASTER,
    optimizer=optimizer_bytes(config, span, optimizer),
    activations=len(span) * kept,
    working=_working_bytes(config, span, batch, sequence, c, _BACKWARD[remat] * layer),
    diloco=2 * parameters * _MASTER if diloco else 0,
  )


_BACKWARD = {True: 1.1, False: 0.85}
"""Working memory of a layer's backward pass, in units of the layer's activations, by whether layers are
rematerialized. Fitted to the steps of tests/count/test_training.py."""

_CPU_COPIES = {"embedding": 1.25, "head": 1.0, "tied head": 2.0}
"""Float32 copies of these matrices that XLA:CPU holds during a bfloat16 step. Fitted to the same steps."""


def _copy_bytes(config: ModelConfig, span: Span, compute_dtype: str, widens: bool) -> int:
  if compute_dtype == "float32":
    return 0
  if not widens:
    return count.span_parameters(config, span) * DTYPE_BYTES[compute_dtype]
  head = _CPU_COPIES["tied head" if config.tied_embedding else "head"]
  ends = span.is_first * _CPU_COPIES["embedding"] + span.is_last * head
  return int(ends * config.vocab_size * config.model_dim * _MASTER)


def _working_bytes(
  config: ModelConfig, span: Span, batch: int, sequence: int, c: int, layer: float
) -> int:
  """Working memory at the peak: the greatest of a layer's backward pass, the update of the largest array,
  and the logits with their gradient (beside a transposed copy of an untied head)."""
  tokens = batch * sequence
  leaf = max(k * n for k, n in count.layer_matrices(config).values()) * _MASTER
  outer = config.vocab_size * config.model_dim * _MASTER
  most = max(layer, leaf, outer * (span.is_first or span.is_last))
  if span.is_last:
    logits = tokens * (2 * config.vocab_size * 4 + 4 + 4)
    most = max(most, logits + outer * (not config.tied_embedding))
  end = tokens * ((2 * config.model_dim + 2) * 4 + config.model_dim * c) * span.is_last
  # The mask: a bit in a byte, and the float32 that stands where it is off.
  around = tokens * (2 * config.head_dim * 4 + config.num_heads * sequence * (1 + 4))
  return int(most) + end + around + tokens * 4 * span.is_first


def optimizer_bytes(config: ModelConfig, span: Span, optimizer: Optimizer) -> int:
  """State of optax's optimizers at a constant learning rate, moments in float32.

    adamw  two moments of every parameter, and a counter
    muon   `optax.contrib.muon` with the matrices of layers under Muon (one momentum) and the rest
           under AdamW; two counters and Newton-Schulz's three coefficients
    sgd    one momentum (without momentum there is nothing)

  A schedule adds a counter of 4 bytes. Source: optax 0.2.8.
  """
  parameters = count.span_parameters(config, span)
  if optimizer == "sgd":
    return parameters * _MASTER
  if optimizer == "adamw":
    return 2 * parameters * _MASTER + 4
  matrices = len(span) * sum(k * n for k, n in count.layer_matrices(config).values())
  return (2 * parameters - matrices) * _MASTER + 2 * 4 + 3 * 4


def activation_bytes(
  config: ModelConfig,
  span: Span,
  *,
  batch: int,
  sequence: int,
  remat: bool,
  compute_dtype: str = "bfloat16",
) -> int:
  """Bytes that the forward pass keeps for the backward one, for `batch` sequences at once.

  These are the residuals of JAX's linearization of `model.neurollm` without the weights, exact to the byte
  in bfloat16 (float32 keeps less: casts vanish), and the gradient of the logits. With c bytes of compute
  dtype, per token and layer:

    norms         2 of (2 D + 2) float32, and D c of the result; with sub_norm (2 N H + 2) and
                  (2 F + 2) float32 more
    attention     q, k, v and the heads' output: (2 N + 2 K) H c; with qk_norm also
                  (N + K) (2 H + 2) float32
    scores        N S (4 + c) of weights, 2 N float32 of their sums
    ffn           6 F c: gate, up, its sigmoid, 1 - sigmoid, silu, and the product

  outside of layers, per token: rotations 4 H/2 float32, the mask, on the first stage the id; on the
  last the final norm, its result, the logits twice (values and gradient) and their sum in float32,
  and the label. With
  `remat` a layer keeps its input, D c, and one layer at a time is as above.

  No flash attention is assumed: our training attention materializes scores, which dominate long
  sequences. Not counted: the backward pass's own temporaries, see `train_bytes`.
  """
  if batch < 1 or sequence < 1:
    raise ValueError(f"batch = {batch}, sequence = {sequence}: both must be positive")
  c, tokens = DTYPE_BYTES[compute_dtype], batch * sequence
  layer = _layer_bytes(config, sequence, c) * tokens
  kept = len(span) * layer
  if remat:
    kept = (len(span) * config.model_dim * c) * tokens + layer
  return kept + _outer_bytes(config, span, batch, sequence, c)


def _layer_bytes(config: ModelConfig, sequence: int, c: int) -> int:
  """Activations that one layer keeps, per token."""
  d, n, k, h = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
  norms = 2 * ((2 * d + 2) * 4 + d * c)
  heads = (2 * n + 2 * k) * h * c
  if config.qk_norm:
    heads += (n + k) * (2 * h + 2) * 4
  if config.sub_norm:
    # Their results are kept in place of their inputs.
    norms += sum((2 * width + 2) * 4 for width in (n * h, config.ffn_dim))
  scores = n * sequence * (4 + c) + 2 * n * 4
  return norms + heads + scores + 6 * config.ffn_dim * c


def _outer_bytes(config: ModelConfig, span: Span, batch: int, sequence: int, c: int) -> int:
  tokens = batch * sequence
  # The mask: a bit in a byte, and the float32 that stands where it is off.
  kept = tokens * (2 * config.head_dim * 4 + config.num_heads * sequence * (1 + 4))
  if span.is_first:
    kept += tokens * 4
  if span.is_last:
    norm = (2 * config.model_dim + 2) * 4 + config.model_dim * c
    logits = 2 * config.vocab_size * 4 + 4 + 4
    kept += tokens * (norm + logits)
  return kept

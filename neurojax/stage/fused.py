"""Runs a span of a ternary model on a GPU by a few large kernels, without a copy of a weight.

Products that share an input are one product, over rows that were put together when the model was
loaded. Every matrix stays stacked on L: a kernel gets the stack and the number of a layer, so that a
loop over layers copies nothing.

Caches are [L, P, K, S, H]: P slots, each for a sequence. A step runs some rows, and each names its
slot; where no slots are named, row b has slot b.

The residual stream is float32, because each layer adds little to much; the kernel for one token keeps
it so too. Everything else that passes between kernels has the programs' `dtype`.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from neurojax.config import ModelConfig, RopeStyle
from neurojax.kernels.attention import api as attention
from neurojax.kernels.attention.reference import turn
from neurojax.kernels.decode import api as token
from neurojax.kernels.decode.reference import Attend, Cache, Norm, normalise, run_layer
from neurojax.kernels.decode.shapes import Shape
from neurojax.kernels.decode.weights import LayerWeights, fuse_rows
from neurojax.kernels.gemm import api as gemm
from neurojax.kernels.gemm.levels import Levels, Order
from neurojax.model import ends
from neurojax.model.cache import KVCache
from neurojax.model.loops import unknown_count
from neurojax.model.neurollm import NeuroLLM
from neurojax.stage import rounded
from neurojax.stage.kernels import Kernels
from neurojax.weights.ternary import TernaryArray, TernaryLayer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fused:
  """A span of a model in the form that the programs read.

  Attributes:
    embedding: [V, D], an array or something with `take`; None unless the span is the first.
    final_norm: float32 [D]; None unless the span is the last.
    head: Rows of V outputs: [D, V], or [V, D] where it is the embedding; None as for final_norm.
  """

  layers: LayerWeights
  embedding: Any
  final_norm: Any
  head: TernaryArray | None
  rope_base: float = field(metadata={"static": True})

  @property
  def nbytes(self) -> int:
    """Bytes of memory; what is shared counts once."""
    return sum({id(leaf): leaf.nbytes for leaf in jax.tree.leaves(self)}.values())

  @property
  def step_nbytes(self) -> int:
    """Bytes that every step reads: all but the embedding, of which a step reads a row per token."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves((self.layers, self.final_norm, self.head)))

  def new_cache(
    self, *, batch: int, capacity: int, dtype: DTypeLike = jnp.bfloat16
  ) -> tuple[Array, Array]:
    """Make empty keys and values [L, P, K, S, H]; `batch` is the number of slots (P)."""
    s = self.layers.shape
    cache = KVCache.zeros(
      num_layers=self.layers.num_layers,
      slots=batch,
      num_kv_heads=s.k,
      capacity=capacity,
      head_dim=s.h,
      dtype=dtype,
    )
    return cache.k_LPKSH, cache.v_LPKSH


def fuse(model: NeuroLLM, *, consume: bool = False) -> Fused:
  """Put the parameters of a model into the form that the programs read.

  Rows of queries and keys are put in the order of rotary style "half"; no score changes.

  Args:
    consume: Take each matrix out of the model before the next ones are put together, so that
      memory never holds more than the weights and one such matrix. The model is useless afterwards.
  Raises: ValueError: names a matrix that is not ternary, or matrices that share an input and
    differ in group size, scale dtype or mode; or `check` refuses the model.
  """
  config = model.config
  check(config)
  block = model.layers

  def ternary(name: str, param: nnx.Param) -> TernaryArray:
    value = param.get_value()
    if not isinstance(value, TernaryArray):
      raise ValueError(
        f"{name} is not ternary: fused programs multiply by ternary matrices alone; load the file"
        " with weights 'w2a8' or 'w2a16', or run the model as it is"
      )
    if consume:
      param.set_value(None)
    return value

  def together(**params: nnx.Param) -> TernaryArray:
    parts = {name: ternary(name, param) for name, param in params.items()}
    kinds = {name: (p.group_size, p.mode, p.scales.dtype.name) for name, p in parts.items()}
    if len(set(kinds.values())) > 1:
      raise ValueError(
        f"matrices that share an input must be quantised alike (group size, mode, scales): {kinds}"
      )
    order = functools.partial(_half_rows, head_dim=config.head_dim, style=config.rope_style)
    return fuse_rows(*(order(p) if name in ("q_DNH", "k_DKH") else p for name, p in parts.items()))

  def norm(param: nnx.Param) -> Array:
    return param.get_value().astype(jnp.float32)

  def head_norm(module: Any) -> Array | None:
    order = _half_order(config.head_dim, config.rope_style)
    return None if module is None else norm(module.scale_D)[:, order]

  attn, ffn = block.attention, block.ffn
  layers = LayerWeights(
    qkv=together(q_DNH=attn.q_DNH, k_DKH=attn.k_DKH, v_DKH=attn.v_DKH),
    o=ternary("o_NHD", attn.o_NHD),
    gate_up=together(gate_DF=ffn.gate_DF, up_DF=ffn.up_DF),
    down=ternary("down_FD", ffn.down_FD),
    attn_norm=norm(block.attn_norm.scale_D),
    ffn_norm=norm(block.ffn_norm.scale_D),
    q_norm=head_norm(attn.q_norm),
    k_norm=head_norm(attn.k_norm),
    shape=shape_of(config),
  )
  span = model.span
  embedding = model.embedding_VD.get_value() if span.is_first else None
  head = None
  if span.is_last:
    name = ends.head_name(config)
    head = ternary(name, getattr(model, name))
  if consume and span.is_first:
    model.embedding_VD.set_value(None)
  return Fused(
    layers=layers,
    embedding=embedding,
    final_norm=norm(model.final_norm.scale_D) if span.is_last else None,
    head=head,
    rope_base=config.rope_base,
  )


def check(config: ModelConfig) -> None:
  """Check that the programs compute an architecture.

  Raises: ValueError: they do not; names what is beyond them.
  """
  if beyond := config.beyond_plain():
    raise ValueError(
      f"{', '.join(beyond)}: fused programs do not compute that; run the model as it is"
    )
  if config.sub_norm:
    raise ValueError(
      "sub_norm = True: fused programs have no norm in front of attention's output and the FFN's"
      " down projection; run the model as it is"
    )


def shape_of(config: Any) -> Shape:
  return Shape(
    d=config.model_dim,
    f=config.ffn_dim,
    n=config.num_heads,
    k=config.num_kv_heads,
    h=config.head_dim,
    norm_eps=config.norm_eps,
  )


def _half_order(head_dim: int, style: RopeStyle) -> np.ndarray:
  """The index in `style` of each element of a head in style "half"."""
  order = np.arange(head_dim)
  return order if style == "half" else np.concatenate([order[0::2], order[1::2]])


def _half_rows(w: TernaryArray, *, head_dim: int, style: RopeStyle) -> TernaryArray:
  if style == "half":
    return w
  order = _half_order(head_dim, style)

  def permute(rows: Array) -> Array:
    heads = rows.reshape(*rows.shape[:-2], -1, head_dim, rows.shape[-1])
    return heads[..., order, :].reshape(rows.shape)

  scales = w.scales if w.group_size is None else permute(w.scales)
  return dataclasses.replace(w, codes=permute(w.codes), scales=scales)


def embed(model: Fused, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
  """Look up float32 rows of the embedding."""
  return ends.embed(model.embedding, tokens, dtype=jnp.float32)


def prefill(
  model: Fused,
  x_BTD: Float[Array, "B T D"],
  keys: Float[Array, "L P K S H"],
  values: Float[Array, "L P K S H"],
  start_B: Int[Array, "B"] | None = None,
  slot_B: Int[Array, "B"] | None = None,
  *,
  kernels: Kernels,
  dtype: DTypeLike = jnp.bfloat16,
) -> tuple[Float[Array, "B T D"], Array, Array]:
  """Run T tokens of each sequence through all layers.

  Where the last tokens are padding, they are stored all the same, behind those that count: nothing
  sees them there before another token is stored in their place.

  Args:
    start_B: Position of each first token, at most S - T; None: all start at 0, and the cache is not
      read.
    slot_B: Slot of each sequence; no two may be the same.
    dtype: Dtype of what passes between kernels.
  Returns: float32 [B, T, D] after the last layer, and the caches with the new positions.
  """
  s = model.layers.shape
  batch, length, width = x_BTD.shape
  starts_B = jnp.zeros(batch, jnp.int32) if start_B is None else start_B
  position_BT = starts_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
  rotation = attention.rotation(position_BT.reshape(-1), s.h, base=model.rope_base, style="half")

  def attend(
    qkv_MX: Array, cache: Cache, layer: Array, order: Order | None = None
  ) -> tuple[Array | Levels, Cache]:
    heads_MNH = qkv_MX.astype(jnp.float32).reshape(batch * length, -1, s.h)
    q, k, v = jnp.split(heads_MNH, (s.n, s.n + s.k), axis=1)
    if model.layers.q_norm is not None:
      norm = _norm(kernels)
      q = norm(q, model.layers.q_norm[layer], s.norm_eps)
      k = norm(k, model.layers.k_norm[layer], s.norm_eps)
    q, k = (turn(heads, rotation, "half") for heads in (q, k))
    q_BTNH, k_BTKH, v_BTKH = (
      heads.reshape(batch, length, -1, s.h).astype(dtype) for heads in (q, k, v)
    )
    keys, values = (
      _write(cache_LPKSH, new_BTKH, layer, start_B, slot_B)
      for cache_LPKSH, new_BTKH in zip(cache, (k_BTKH, v_BTKH), strict=True)
    )
    on_gpu = kernels.attention == "gpu"
    if start_B is None:
      out_BTNH = attention.attend(
        q_BTNH, k_BTKH, v_BTKH, implementation="cudnn" if on_gpu else "reference"
      )
    else:
      out_BTNH = attention.attend_cache(
        q_BTNH, keys, values, layer, start_B,
        slot_B=slot_B, implementation="triton" if on_gpu else "reference",
      )  # fmt: skip
    out_MY = out_BTNH.reshape(batch * length, -1)
    return rounded.levels(out_MY, order) if order else out_MY, (keys, values)

  x_MD, cache = _run_layers(
    model.layers, x_BTD.reshape(-1, width), (keys, values), attend, kernels, dtype, start_B
  )
  return x_MD.reshape(x_BTD.shape), *cache


def decode_batch(
  model: Fused,
  x_BD: Float[Array, "B D"],
  keys: Float[Array, "L P K S H"],
  values: Float[Array, "L P K S H"],
  position_B: Int[Array, "B"],
  slot_B: Int[Array, "B"] | None = None,
  *,
  kernels: Kernels,
) -> tuple[Float[Array, "B D"], Array, Array]:
  """Run one token of each sequence through all layers; what passes between kernels is float32.

  Args:
    position_B: A row whose position is below 0 or not below S is padding: it stores nothing.
    slot_B: Slot of each row. Padding may name any; other rows have one each.
  Returns: float32 [B, D] after the last layer, and the caches with `position_B` written.
  """
  layers, s = model.layers, model.layers.shape
  rotation = attention.rotation(position_B, s.h, base=model.rope_base, style="half")

  def attend(
    qkv_BX: Array, cache: Cache, layer: Array, order: Order | None = None
  ) -> tuple[Array | Levels, Cache]:
    norms = None if layers.q_norm is None else (layers.q_norm, layers.k_norm)
    if order:
      return rounded.attend(
        qkv_BX, cache, layer, position_B, slot_B, rotation, norms, s.norm_eps, order
      )
    norms = norms and (norms[0][layer], norms[1][layer])
    out_BY, keys, values = attention.decode(
      qkv_BX, *cache, layer, position_B,
      slot_B=slot_B, rotation_B2H=rotation, norms=norms, norm_eps=s.norm_eps,
      implementation="triton" if kernels.attention == "gpu" else "reference",
    )  # fmt: skip
    return out_BY, (keys, values)

  x_BD, cache = _run_layers(
    layers, x_BD, (keys, values), attend, kernels, jnp.float32, position_B, is_step=True
  )
  return x_BD, *cache


def has_token_kernel(model: Fused, batch: int, kernels: Kernels) -> bool:
  """Tell whether `decode_one`, and not `decode_batch`, takes a token of `batch` sequences.

  Its sums have an order of their own: a sequence alone then has other bits than among others, and
  may take another token where two are within rounding of each other. `Kernels.programs` = 0 is the
  way without it.
  """
  return batch == 1 and kernels.programs > 0 and model.layers.qkv.mode == "w2a8"


def decode_one(
  model: Fused,
  x_BD: Float[Array, "1 D"],
  keys: Float[Array, "L P K S H"],
  values: Float[Array, "L P K S H"],
  position_B: Int[Array, "1"],
  slot_B: Int[Array, "1"] | None = None,
  *,
  kernels: Kernels,
  head: bool,
) -> tuple[Float[Array, "1 D"], Float[Array, "1 V"] | None, Array, Array]:
  """Run one token of one sequence through all layers as a single kernel.

  Args:
    head: Go on through final norm and head, which the span must then have.
  Returns: float32 [1, D] after the last layer, logits or None, and the caches.
  Raises: NotImplementedError: the kernel does not take these shapes.
  """
  h = model.layers.shape.h
  rotation = attention.rotation(position_B, h, base=model.rope_base, style="half")
  x_D, logits_V, keys, values = token.decode(
    x_BD[0], model.layers, keys, values, rotation, position_B[0],
    slot=None if slot_B is None else slot_B[0],
    final_norm=model.final_norm if head else None, head=model.head if head else None,
    implementation="triton", programs=kernels.programs, interpret=kernels.interpret,
  )  # fmt: skip
  return x_D[None], None if logits_V is None else logits_V[None], keys, values


def decode(
  model: Fused,
  x_BD: Float[Array, "B D"],
  keys: Float[Array, "L P K S H"],
  values: Float[Array, "L P K S H"],
  position_B: Int[Array, "B"],
  slot_B: Int[Array, "B"] | None = None,
  *,
  kernels: Kernels,
) -> tuple[Float[Array, "B D"], Array, Array]:
  """Run one token of each sequence through all layers, by `decode_one` or `decode_batch`."""
  if not has_token_kernel(model, x_BD.shape[0], kernels):
    return decode_batch(model, x_BD, keys, values, position_B, slot_B, kernels=kernels)
  x_BD, _, keys, values = decode_one(
    model, x_BD, keys, values, position_B, slot_B, kernels=kernels, head=False
  )
  return x_BD, keys, values


def logits(model: Fused, x_BD: Float[Array, "B D"], *, kernels: Kernels) -> Float[Array, "B V"]:
  """Compute float32 logits from the last layer's output."""
  if rounded.takes(kernels, model.head):
    return rounded.logits(x_BD, model.final_norm, model.head, model.layers.shape.norm_eps, kernels)
  norm = _norm(kernels) if kernels.invariant else ends.final_norm
  x_BD = norm(x_BD, model.final_norm, model.layers.shape.norm_eps)
  return multiply(x_BD, model.head, None, kernels=kernels)


def step(
  model: Fused,
  tokens_B: Int[Array, "B"],
  keys: Float[Array, "L P K S H"],
  values: Float[Array, "L P K S H"],
  position_B: Int[Array, "B"],
  slot_B: Int[Array, "B"] | None = None,
  *,
  kernels: Kernels,
) -> tuple[Float[Array, "B V"], Array, Array]:
  """Run one token of each sequence, from its id to the logits of the next one; returns caches too."""
  x_BD = embed(model, tokens_B)
  if has_token_kernel(model, tokens_B.shape[0], kernels):
    _, logits_BV, keys, values = decode_one(
      model, x_BD, keys, values, position_B, slot_B, kernels=kernels, head=True
    )
    return logits_BV, keys, values
  x_BD, keys, values = decode_batch(model, x_BD, keys, values, position_B, slot_B, kernels=kernels)
  return logits(model, x_BD, kernels=kernels), keys, values


def generate(
  model: Fused,
  tokens_B: Int[Array, "B"],
  keys: Float[Array, "L P K S H"],
  values: Float[Array, "L P K S H"],
  position_B: Int[Array, "B"],
  key: Array | None = None,
  slot_B: Int[Array, "B"] | None = None,
  *,
  steps: int,
  temperature: float = 0.0,
  kernels: Kernels,
) -> tuple[Int[Array, "B T"], Array, Array]:
  """Generate `steps` tokens of each sequence on the device: each step reads what the last one chose.

  Args:
    tokens_B: The last token of each sequence so far, which is not in the cache yet.
    position_B: Its position; position_B + steps must not exceed the capacity. Below 0 for a row that
      is padding, whose tokens have no meaning.
    key: A random key, for a temperature > 0. At 0 the likeliest token is taken (ties: the lowest id).
    slot_B: Slot of each sequence.
  Returns: The tokens, and the caches: donate them, and they are written in place.
  """
  if temperature and key is None:
    raise ValueError(f"temperature = {temperature}: sampling needs a key")

  def body(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
    out_BT, tokens_B, keys, values = carry
    at_B = jnp.where(position_B < 0, position_B, position_B + i)
    logits_BV, keys, values = step(model, tokens_B, keys, values, at_B, slot_B, kernels=kernels)
    if temperature:
      tokens_B = jax.random.categorical(jax.random.fold_in(key, i), logits_BV / temperature)
    else:
      tokens_B = jnp.argmax(logits_BV, axis=-1)
    tokens_B = tokens_B.astype(jnp.int32)
    return lax.dynamic_update_index_in_dim(out_BT, tokens_B, i, 1), tokens_B, keys, values

  out_BT = jnp.zeros((tokens_B.shape[0], steps), jnp.int32)
  # A count that XLA knows spares a look at the device after every token.
  out_BT, _, keys, values = lax.fori_loop(
    0, steps, body, (out_BT, tokens_B.astype(jnp.int32), keys, values)
  )
  return out_BT, keys, values


def multiply(
  x_MK: Float[Array, "M K"],
  w: TernaryArray,
  layer: Int[Array, ""] | None,
  *,
  kernels: Kernels,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, "M N"]:
  """Multiply x by the rows of a matrix, or of layer `layer` of a stack, in the weight's mode."""
  if kernels.product == "dense":
    # Imported when needed: it loads the GPU's compiler.
    from neurojax.kernels.gemm import triton

    if kernels.invariant:
      raise ValueError("cuBLAS adds up in an order of its choice: product 'dense' is not invariant")
    return triton.prefill(x_MK, w, layer=layer).astype(dtype)
  product = functools.partial(gemm.matmul, x_MK, w if layer is None else TernaryLayer(w, layer))
  if kernels.product == "reference":
    return product(implementation="reference").astype(dtype)
  by, arguments = rounded.choose(x_MK.shape[0], w, kernels)
  if by == "triton":
    return product(implementation="triton", **arguments).astype(dtype)
  return product(implementation="mosaic", dtype=dtype, **arguments)


def _norm(kernels: Kernels) -> Norm:
  if not kernels.invariant or kernels.attention == "reference":
    return normalise
  # Imported when needed: it loads the GPU's compiler.
  from neurojax.kernels import norm

  return norm.normalise


def _run_layers(
  layers: LayerWeights,
  x_MD: Array,
  cache: Cache,
  attend: Attend,
  kernels: Kernels,
  dtype: DTypeLike,
  start_B: Array | None,
  *,
  is_step: bool = False,
) -> tuple[Array, Cache]:
  """Run M tokens through all layers."""
  loop = functools.partial(_loop, layers.num_layers, kernels, start_B)
  x_MD = x_MD.astype(jnp.float32)
  if rounded.takes(kernels, layers.qkv, layers.o, layers.gate_up, layers.down):
    return rounded.run_layers(layers, x_MD, cache, attend, kernels, dtype, loop, is_step=is_step)

  def layer(i: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
    return run_layer(
      *carry, layers, i,
      attend=attend, multiply=functools.partial(multiply, kernels=kernels), dtype=dtype,
      norm=_norm(kernels),
    )  # fmt: skip

  return loop(layer, (x_MD, cache))


def _loop(
  count: int,
  kernels: Kernels,
  start_B: Array | None,
  layer: Callable[[Array, Any], Any],
  carry: Any,
) -> Any:
  """Run `layer` with the index of each of `count` layers."""
  if kernels.unroll:
    for i in range(count):
      carry = layer(jnp.int32(i), carry)
    return carry
  if count == 1 and start_B is not None:
    count = unknown_count(1, jnp.maximum(start_B[0], 0))
  return lax.fori_loop(0, count, layer, carry)


def _write(
  cache_LPKSH: Array,
  new_BTKH: Array,
  layer: Array,
  start_B: Array | None,
  slot_B: Array | None,
) -> Array:
  new_BKTH = new_BTKH.astype(cache_LPKSH.dtype).swapaxes(1, 2)
  if start_B is None and slot_B is None:
    return lax.dynamic_update_slice(cache_LPKSH, new_BKTH[None], (layer, 0, 0, 0, 0))
  for b in range(new_BKTH.shape[0]):
    slot, start = b if slot_B is None else slot_B[b], 0 if start_B is None else start_B[b]
    at = (layer, slot, 0, start, 0)
    cache_LPKSH = lax.dynamic_update_slice(cache_LPKSH, new_BKTH[None, b : b + 1], at)
  return cache_LPKSH

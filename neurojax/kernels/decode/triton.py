"""One token through a span of layers, and through the head, as a single persistent kernel.

A grid of one program per multiprocessor walks through all layers. A layer is five phases (q, k and
v; attention; output projection; gate and up; down) with a barrier over the grid after each, since
every program needs all that the others computed. What would be idle time at a barrier is used to
read ahead: the first weights of the next phase are requested before the wait.

Activations are int8 with one scale per token ("w2a8"): sums of a block of 64 products are exact
integers, which float32 adds up after multiplication by the scale. Each program normalises and
rounds the whole input of a phase for itself; that is cheaper than another barrier.

Grid barriers need all programs on the chip at once: one per multiprocessor, no more.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from neurojax.kernels.decode.tiles import TILE, Ops, Unit, round_bits, store_planes
from neurojax.kernels.decode.weights import LayerWeights, Shape
from neurojax.ternary.array import TernaryArray

WARPS = 16
_ROWS = 16
"""Outputs of a unit of work: one for each warp."""
_KEYS = 64
"""Keys that attention takes at once."""
_LOG2E = 1.4426950408889634
_MASKED = -1e30
"""Below any score, yet finite: a row of masked keys gives no NaN."""
_APART = 32
"""Counters of heads start here, on another cache line than the grid's."""


@dataclasses.dataclass(frozen=True)
class Product:
  """How the programs share one matrix: programs of chunk c multiply its columns from c on.

  Attributes:
    n, k: Rows and columns of the matrix.
    programs: Of the grid.
    paired: Rows i and i + n/2 go to the same program, and its results are SwiGLU(i, i + n/2).
  """

  n: int
  k: int
  group: int
  programs: int
  paired: bool = False

  @property
  def chunks(self) -> int:
    return -(-self.k // (TILE * self.unit.tiles))

  @property
  def programs_per_chunk(self) -> int:
    return self.programs // self.chunks

  @property
  def outputs(self) -> int:
    return self.n // 2 if self.paired else self.n

  @property
  def unit(self) -> Unit:
    """Two tiles keep the activations of a chunk in 32 registers."""
    total = -(-self.k // TILE)
    tiles = pl.next_power_of_2(total) if self.programs == 1 else 2 - total % 2
    return Unit(rows=_ROWS, tiles=tiles, parts=2 if self.paired else 1)

  @property
  def rounds(self) -> int:
    return -(-self.outputs // (_ROWS * self.programs_per_chunk))

  @property
  def slots(self) -> int:
    """Units that are requested ahead: about 48 KiB of codes."""
    return min(max(1, 96 // self.unit.count), self.rounds)


class _Kernel:
  """The body of the kernel: everything that is known when it is compiled, and its references."""

  def __init__(
    self,
    shape: Shape,
    *,
    layers: int,
    programs: int,
    capacity: int,
    head: int,
    groups: dict[str, int],
    interpret: bool,
  ):
    s = shape
    self.shape, self.layers, self.programs, self.capacity = s, layers, programs, capacity
    self.ops = Ops(interpret)
    product = functools.partial(Product, programs=programs)
    self.qkv = product((s.n + 2 * s.k) * s.h, s.d, groups["qkv"])
    self.o = product(s.d, s.n * s.h, groups["o"])
    self.gate_up = product(2 * s.f, s.d, groups["gate_up"], paired=True)
    self.down = product(s.d, s.f, groups["down"])
    self.head = product(head, s.d, groups["head"]) if head else None
    self.splits = max(1, min(programs // s.k, -(-capacity // _KEYS)))

  # --- weights -----------------------------------------------------------------------------------

  def _first(self, p: Product, index: Array) -> Array:
    """The first output of unit `index` of this program; past the last one for a program without."""
    place = jnp.where(
      self.pid < p.chunks * p.programs_per_chunk, lax.div(self.pid, p.chunks), p.outputs
    )
    return (place + index * p.programs_per_chunk) * _ROWS

  def _load(self, p: Product, refs, layer: Array, index: Array):
    """Codes and scales of unit `index` of this program."""
    tile = lax.rem(self.pid, p.chunks) * p.unit.tiles
    return p.unit.load(*refs, layer, self._first(p, index), p.outputs, tile, p.group)

  def prefetch(self, p: Product, refs, layer: Array):
    return [self._load(p, refs, layer, i) for i in range(p.slots)]

  def _sums(self, p: Product, loaded, x, scale):
    """Results of one unit, float32 [rows]."""
    codes, scales = loaded
    planes, x_sums = x
    sums = (self.ops.dot(codes, planes) - x_sums).astype(jnp.float32) * scales.astype(jnp.float32)
    y = p.unit.add_tiles(sums.sum(1)) * scale
    if not p.paired:
      return y.reshape(_ROWS)
    part = lax.broadcasted_iota(jnp.int32, y.shape, 0)
    gate, up = [jnp.sum(jnp.where(part == i, y, 0), axis=0) for i in range(2)]
    return gate / (1 + jnp.exp2(gate * -_LOG2E)) * up

  def multiply(self, p: Product, refs, layer, slots, x, scale, out_ref, then):
    """Multiply this program's rows by x; `then` requests what the next phase starts with.

    Returns: What `then` returned, and the largest |result|.
    """
    chunk = lax.rem(self.pid, p.chunks)
    depth = len(slots)

    def put(index, loaded, top):
      y = self._sums(p, loaded, x, scale)
      rows = self._first(p, index) + jnp.arange(_ROWS)
      if self.ops.interpret:
        plgpu.store(out_ref.at[chunk, rows], y, mask=rows < p.outputs)
        return jnp.maximum(top, jnp.where(rows < p.outputs, jnp.abs(y), 0))
      # In the layout that the sums have: any other would be a detour through shared memory.
      wide = jnp.broadcast_to(y[:, None], (_ROWS, 32))
      row = self.ops.opaque(jnp.broadcast_to(rows[:, None], (_ROWS, 32)))
      lane = lax.broadcasted_iota(jnp.int32, (_ROWS, 32), 1)
      plgpu.store(out_ref.at[chunk, row], wide, mask=(row < p.outputs) & (lane == 0))
      return jnp.maximum(top, jnp.where(rows < p.outputs, jnp.abs(y), 0))

    def body(j, carry):
      slots, top = carry
      fresh = []
      for i, slot in enumerate(slots):
        top = put(j * depth + i, slot, top)
        fresh.append(self._load(p, refs, layer, j * depth + i + depth))
      return fresh, top

    # Units past the last row request nothing and store nothing.
    turns = -(-p.rounds // depth)
    _, top = lax.fori_loop(0, turns, body, (slots, jnp.zeros(_ROWS, jnp.float32)))
    return then(), jnp.max(top)

  # --- activations -------------------------------------------------------------------------------

  def _quantise(self, p: Product, refs, v_K: Array, top: Array):
    """Round a chunk of a vector, whose largest magnitude is `top`, to int8.

    Returns: For `Ops.dot`, planes and block sums; and the scale.
    """
    inverse = jnp.where(top > 0, 127 / top, 0.0)
    store_planes(refs.rounded, self.pid, round_bits(v_K * inverse))
    self._block_barrier()
    planes = p.unit.load_planes(refs.rounded, self.pid)
    return (planes, self.ops.block_sums(planes)), top * (1 / 127)

  def _residual(self, x_ref, parts_ref, parts: Product, keep_ref, live) -> Array:
    """x + sum of parts, float32, zero from D on; program 0 keeps it.

    live: False in the first layer, whose input has no parts yet.
    """
    i = jnp.arange(_padded(self.shape.d))
    inside = i < self.shape.d
    v = plgpu.load(x_ref.at[i], mask=inside, other=0.0, volatile=True)
    for c in range(parts.chunks):
      v += plgpu.load(parts_ref.at[c, i], mask=inside & live, other=0.0, volatile=True)
    plgpu.store(keep_ref.at[i], v, mask=inside & (self.pid == 0))
    return v

  def _normalise(self, p: Product, refs, v: Array, gain_ref, layer):
    """RMSNorm, rounded to int8: planes and block sums, and the scale."""
    i = jnp.arange(v.shape[0])
    scaled = v * plgpu.load(gain_ref.at[layer, i], mask=i < self.shape.d, other=0.0)
    mean = jnp.sum(v * v) / self.shape.d
    x, scale = self._quantise(p, refs, scaled, jnp.max(jnp.abs(scaled)))
    return x, scale * lax.rsqrt(mean + self.shape.norm_eps)

  # --- attention ---------------------------------------------------------------------------------

  def _head(self, qkv_ref, head, cos, sin, norm_ref, layer, rows: int, valid: int):
    """Heads head .. head+valid, normalised and rotated: two halves, float32 [rows, H/2]."""
    half = self.shape.h // 2
    r = jnp.arange(rows)[:, None]
    column = jnp.arange(half)[None, :]
    inside = jnp.broadcast_to(r < valid, (rows, half))
    at = (head + r) * self.shape.h + column
    a = plgpu.load(qkv_ref.at[0, at], mask=inside, other=0.0, volatile=True)
    b = plgpu.load(qkv_ref.at[0, at + half], mask=inside, other=0.0, volatile=True)
    if norm_ref is not None:
      mean = (jnp.sum(a * a, axis=1) + jnp.sum(b * b, axis=1)) / self.shape.h
      r = lax.rsqrt(mean + self.shape.norm_eps)[:, None]
      a = a * r * norm_ref[layer, pl.ds(0, half)][None, :]
      b = b * r * norm_ref[layer, pl.ds(half, half)][None, :]
    return a * cos - b * sin, b * cos + a * sin

  def attend(self, layer, refs, position):
    """This program's share of the keys of one key-value head; the last one of a head joins all."""
    s, splits = self.shape, self.splits
    length = position + 1
    # Whole blocks of keys for each split; splits past the last key have nothing to do.
    share = lax.div(length + splits * _KEYS - 1, splits * _KEYS) * _KEYS
    active = lax.div(length + share - 1, share)

    def unit(u):
      head, split = lax.div(u, splits), lax.rem(u, splits)

      @pl.when(split < active)
      def _():
        self._attend_share(layer, refs, head, split, split * share, share, position)
        self._join(layer, refs, head, active)

    if self.programs >= s.k * splits:
      pl.when(self.pid < s.k * splits)(lambda: unit(self.pid))
    else:
      count = -(-s.k * splits // self.programs)

      def step(i, _):
        u = self.pid + i * self.programs
        pl.when(u < s.k * splits)(lambda: unit(u))
        return 0

      lax.fori_loop(0, count, step, 0)

  def _attend_share(self, layer, refs, head, split, start, share, position):
    s, half = self.shape, self.shape.h // 2
    rows = 16
    kind = refs.keys.dtype
    column = jnp.arange(half)
    cos, sin = refs.cos[column][None, :], refs.sin[column][None, :]

    @pl.when((start <= position) & (position < start + share))
    def _():
      a, b = self._head(refs.qkv_out, s.n + head, cos, sin, refs.k_norm, layer, 1, 1)
      plgpu.store(refs.keys.at[layer, 0, head, position, column], a.reshape(half).astype(kind))
      plgpu.store(
        refs.keys.at[layer, 0, head, position, half + column], b.reshape(half).astype(kind)
      )
      whole = jnp.arange(s.h)
      v = plgpu.load(refs.qkv_out.at[0, (s.n + s.k + head) * s.h + whole], volatile=True)
      plgpu.store(refs.values.at[layer, 0, head, position, whole], v.astype(kind))

    self._block_barrier()
    a, b = self._head(refs.qkv_out, head * s.g, cos, sin, refs.q_norm, layer, rows, s.g)
    factor = s.h**-0.5 * _LOG2E
    qa, qb = (a * factor).astype(kind), (b * factor).astype(kind)

    def block(i, carry):
      top, total, out = carry
      key = start + i * _KEYS + jnp.arange(_KEYS)
      seen = key <= position
      mask = jnp.broadcast_to(seen[:, None], (_KEYS, half))
      ka = plgpu.load(
        refs.keys.at[layer, 0, head, key[:, None], column[None, :]], mask=mask, other=0
      )
      kb = plgpu.load(
        refs.keys.at[layer, 0, head, key[:, None], half + column[None, :]], mask=mask, other=0
      )
      score = _dot(qa, ka.T) + _dot(qb, kb.T)
      score = jnp.where(seen[None, :], score, _MASKED)
      new_top = jnp.maximum(top, score.max(1))
      weight = jnp.exp2(score - new_top[:, None])
      shrink = jnp.exp2(top - new_top)
      v = plgpu.load(
        refs.values.at[layer, 0, head, key[:, None], jnp.arange(s.h)[None, :]],
        mask=jnp.broadcast_to(seen[:, None], (_KEYS, s.h)),
        other=0,
      )
      out = out * shrink[:, None] + _dot(weight.astype(kind), v)
      return new_top, total * shrink + weight.sum(1), out

    last = jnp.minimum(start + share, position + 1)
    count = lax.div(last - start + _KEYS - 1, _KEYS)
    carry = (
      jnp.full(rows, _MASKED, jnp.float32),
      jnp.zeros(rows, jnp.float32),
      jnp.zeros((rows, s.h), jnp.float32),
    )
    top, total, out = lax.fori_loop(0, count, block, carry)
    g = jnp.arange(rows)
    valid = g < s.g
    plgpu.store(refs.tops.at[head, split, g], top, mask=valid)
    plgpu.store(refs.totals.at[head, split, g], total, mask=valid)
    plgpu.store(
      refs.shares.at[head, split, g[:, None], jnp.arange(s.h)[None, :]],
      out,
      mask=jnp.broadcast_to(valid[:, None], (rows, s.h)),
    )

  def _join(self, layer, refs, head, active):
    s = self.shape
    arrived = self._count(refs.sync, _APART + layer * s.k + head)

    @pl.when(arrived == active - 1)
    def _():
      split = jnp.arange(pl.next_power_of_2(self.splits))
      used = split < active
      column = jnp.arange(s.h)
      for g in range(s.g):
        top = plgpu.load(refs.tops.at[head, split, g], mask=used, other=_MASKED, volatile=True)
        total = plgpu.load(refs.totals.at[head, split, g], mask=used, other=0.0, volatile=True)
        out = plgpu.load(
          refs.shares.at[head, split[:, None], g, column[None, :]],
          mask=jnp.broadcast_to(used[:, None], (split.shape[0], s.h)),
          other=0.0,
          volatile=True,
        )
        weight = jnp.exp2(top - jnp.max(top))
        joined = jnp.sum(out * weight[:, None], axis=0) / jnp.sum(total * weight)
        plgpu.store(refs.attended.at[(head * s.g + g) * s.h + column], joined)

  # --- synchronisation ---------------------------------------------------------------------------

  def _block_barrier(self):
    if not self.ops.interpret:
      plgpu.debug_barrier()

  def _count(self, ref, at):
    """Count this program in; how many came before. What they wrote is visible afterwards."""
    self._block_barrier()
    if self.ops.interpret:
      before = ref[at]
      ref[at] = before + 1
      return before
    before = plgpu.atomic_add(ref, at, jnp.int32(1))
    self._block_barrier()
    return before

  def barrier(self, refs, round_: Array) -> None:
    """Wait until all programs came here `round_` times. What they wrote is visible afterwards."""
    if self.ops.interpret:
      return
    plgpu.debug_barrier()
    plgpu.atomic_add(refs.sync, 0, jnp.int32(1))
    target = round_ * self.programs
    thread = jnp.arange(32 * WARPS)

    def wait(state):
      seen = plgpu.load(refs.sync.at[thread * 0], mask=thread == 0, other=0, volatile=True)
      return jnp.sum(seen), state[1]

    seen, _ = lax.while_loop(lambda state: state[0] < state[1], wait, (jnp.int32(0), target))
    # Never happens; without a use of its result the loop would be dropped as dead code.
    plgpu.store(refs.sync.at[1], seen, mask=seen < target)

  # --- the walk ----------------------------------------------------------------------------------

  def run(self, refs):
    s = self.shape
    # Read once: interpret mode knows no program inside a loop.
    self.pid = pl.program_id(0)
    position = refs.position[0]
    zero = jnp.int32(0)
    start = self.prefetch(self.qkv, refs.qkv, zero)

    def layer_step(layer, slots):
      x = self._residual(refs.x_mid, refs.down_out, self.down, refs.x, layer > 0)
      x, scale = self._normalise(self.qkv, refs, x, refs.attn_norm, layer)
      slots, _ = self.multiply(
        self.qkv, refs.qkv, layer, slots, x, scale, refs.qkv_out,
        lambda: self.prefetch(self.o, refs.o, layer),
      )  # fmt: skip
      self.barrier(refs, 5 * layer + 1)
      self.attend(layer, refs, position)
      self.barrier(refs, 5 * layer + 2)

      i = jnp.arange(_padded(s.n * s.h))
      attended = plgpu.load(refs.attended.at[i], mask=i < s.n * s.h, other=0.0, volatile=True)
      x, scale = self._quantise(self.o, refs, attended, jnp.max(jnp.abs(attended)))
      slots, _ = self.multiply(
        self.o, refs.o, layer, slots, x, scale, refs.o_out,
        lambda: self.prefetch(self.gate_up, refs.gate_up, layer),
      )  # fmt: skip
      self.barrier(refs, 5 * layer + 3)

      x = self._residual(refs.x, refs.o_out, self.o, refs.x_mid, True)
      x, scale = self._normalise(self.gate_up, refs, x, refs.ffn_norm, layer)
      slots, top = self.multiply(
        self.gate_up, refs.gate_up, layer, slots, x, scale, refs.hidden,
        lambda: self.prefetch(self.down, refs.down, layer),
      )  # fmt: skip
      plgpu.store(refs.hidden_tops.at[self.pid], top)
      self.barrier(refs, 5 * layer + 4)

      lanes = jnp.arange(pl.next_power_of_2(self.programs))
      tops = plgpu.load(
        refs.hidden_tops.at[lanes], mask=lanes < self.programs, other=0.0, volatile=True
      )

      chunk = _padded(min(s.f, self.down.unit.tiles * TILE))
      i = lax.rem(self.pid, self.down.chunks) * chunk + jnp.arange(chunk)
      hidden = plgpu.load(refs.hidden.at[0, i], mask=i < s.f, other=0.0, volatile=True)
      x, scale = self._quantise(self.down, refs, hidden, jnp.max(tops))
      following = jnp.minimum(layer + 1, self.layers - 1)
      slots, _ = self.multiply(
        self.down, refs.down, layer, slots, x, scale, refs.down_out,
        lambda: self.prefetch(self.qkv, refs.qkv, following),
      )  # fmt: skip
      self.barrier(refs, 5 * layer + 5)
      return slots

    lax.fori_loop(0, self.layers, layer_step, start)
    self._finish(refs)

  def _finish(self, refs):
    x = self._residual(refs.x_mid, refs.down_out, self.down, refs.x_out, True)
    if self.head:
      zero = jnp.int32(0)
      x, scale = self._normalise(self.head, refs, x, refs.final_norm, zero)
      slots = self.prefetch(self.head, refs.head, zero)
      self.multiply(self.head, refs.head, zero, slots, x, scale, refs.logits, lambda: None)


def _padded(width: int) -> int:
  """Elements of an array that holds whole tiles of `width`; Triton's sizes are powers of two."""
  return max(TILE, pl.next_power_of_2(width))


def _dot(a: Array, b: Array) -> Array:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def supports(weights: LayerWeights, capacity: int, programs: int) -> str | None:
  """Why `decode` cannot run these weights on so many programs, or None if it can."""
  s = weights.shape
  for name, width in (("model width", s.d), ("width of all query heads", s.n * s.h)):
    if width > 2 * TILE or width % 64:
      return f"{name} {width}: a multiple of 64, at most {2 * TILE}"
  if s.f % 64:
    return f"FFN width {s.f}: a multiple of 64"
  if s.h & (s.h - 1) or s.g > 16:
    return f"head width {s.h} with {s.g} queries a key: a power of two, and at most 16"
  most = max(m.codes.size for m in (weights.qkv, weights.o, weights.gate_up, weights.down))
  if most >= 2**31:
    return f"{most} bytes of codes in one stack: offsets have 31 bits"
  if 2 * weights.num_layers * s.k * capacity * s.h >= 2**32:
    return f"a cache for {capacity} positions: its offsets have 32 bits"
  if programs < max(1, -(-s.f // TILE)) and programs != 1:
    return f"{programs} programs: too few for {s.f} columns"
  for name in ("qkv", "o", "gate_up", "down"):
    if getattr(weights, name).mode != "w2a8":
      return f"{name} is {getattr(weights, name).mode}: this kernel rounds activations to int8"
  return None


def decode(
  x_D: Array,
  weights: LayerWeights,
  keys: Array,
  values: Array,
  cos: Array,
  sin: Array,
  position: Array,
  *,
  final_norm: Array | None = None,
  head: TernaryArray | None = None,
  programs: int,
  interpret: bool = False,
) -> tuple[Array, Array | None, Array, Array]:
  """One token through the layers, and through final norm and head if they are given.

  Args:
    x_D: float32 [D], the input of the first layer.
    keys, values: bfloat16 [L, 1, K, S, H]; position `position` of each layer is written.
    cos, sin: float32 [H / 2], of the rotation at this position.
    position: int32 scalar, below S.
    head: [D, V] or [V, D] as rows of V outputs.
    programs: Multiprocessors of the device; 1 in interpret mode.
  Returns: x float32 [D] after the last layer, logits float32 [V] or None, keys, values.
  Raises: NotImplementedError: `supports` names the reason, or jax is older than 0.11.2.
  """
  s = weights.shape
  if not interpret and jax.__version_info__ < (0, 11, 2):
    raise NotImplementedError(f"needs jax 0.11.2 or newer, this is {jax.__version__}")
  if reason := supports(weights, keys.shape[3], programs):
    raise NotImplementedError(reason)
  matrices = {name: getattr(weights, name) for name in ("qkv", "o", "gate_up", "down")}
  if head is not None:
    matrices["head"] = jax.tree.map(lambda leaf: leaf[None], head)
  num_layers, capacity = weights.num_layers, keys.shape[3]
  kernel = _Kernel(
    s,
    layers=num_layers,
    programs=programs,
    capacity=capacity,
    head=head.contraction.n if head is not None else 0,
    groups={name: m.group_size or _whole(m) for name, m in matrices.items()}
    | ({} if head is not None else {"head": 64}),
    interpret=interpret,
  )
  inputs = {"position": position.reshape(1), "cos": cos, "sin": sin}
  inputs |= {"attn_norm": weights.attn_norm, "ffn_norm": weights.ffn_norm}
  if weights.q_norm is not None:
    inputs |= {"q_norm": weights.q_norm, "k_norm": weights.k_norm}
  if head is not None:
    inputs["final_norm"] = final_norm.reshape(1, -1)
  for name, m in matrices.items():
    inputs[f"{name}.codes"], inputs[f"{name}.scales"] = m.codes, m.scales
  shared = {
    "x_mid": x_D,
    "keys": keys,
    "values": values,
    "sync": jnp.zeros(_APART + num_layers * s.k, jnp.int32),
  }
  widths = {
    "x": (s.d,),
    "qkv_out": (1, kernel.qkv.outputs),
    "attended": (s.n * s.h,),
    "o_out": (kernel.o.chunks, s.d),
    "hidden": (1, s.f),
    "hidden_tops": (programs,),
    "down_out": (kernel.down.chunks, s.d),
    "tops": (s.k, kernel.splits, s.g),
    "totals": (s.k, kernel.splits, s.g),
    "shares": (s.k, kernel.splits, s.g, s.h),
    "x_out": (s.d,),
  }
  most = max(p.unit.tiles for p in (kernel.qkv, kernel.o, kernel.down))
  rounded = jax.ShapeDtypeStruct((programs, most * TILE), jnp.int8)
  if kernel.head:
    widths["logits"] = (1, kernel.head.outputs)
  names = [*inputs, *shared]
  outputs = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in shared.items()}
  outputs |= {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in widths.items()}
  outputs["rounded"] = rounded

  def body(*refs):
    given = dict(zip(names, refs[: len(names)], strict=True)) | dict(
      zip(outputs, refs[len(names) :], strict=True)
    )
    for name in matrices:
      given[name] = (given.pop(f"{name}.codes"), given.pop(f"{name}.scales"))
    kernel.run(types.SimpleNamespace(**({"q_norm": None, "k_norm": None} | given)))

  results = pl.pallas_call(
    body,
    grid=(programs,),
    out_shape=tuple(outputs.values()),
    input_output_aliases={len(inputs) + i: i for i in range(len(shared))},
    compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
    interpret=interpret,
    name="ternary_decode",
  )(*inputs.values(), *shared.values())
  results = dict(zip(outputs, results, strict=True))
  logits = results["logits"][0] if kernel.head else None
  return results["x_out"], logits, results["keys"], results["values"]


def _whole(m: TernaryArray) -> int:
  return m.codes.shape[-1] * 4

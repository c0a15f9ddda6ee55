"""Runs one token through a span of layers, and through the head, as a single persistent kernel.

A grid of one program per multiprocessor walks through all layers. A layer is five phases (q, k and
v; attention; output projection; gate and up; down) with a barrier over the grid after each, since
every program needs all that the others computed. What would be idle time at a barrier is used to
read ahead: the first weights of the next phase, the norm's scale and the keys are requested before
the wait.

Activations are int8 with one scale per token ("w2a8"): sums of a block of 64 products are exact
integers, which float32 adds up after multiplication by the scale. Each program normalises and
rounds the whole input of a phase for itself; that is cheaper than another barrier.

Grid barriers need all programs on the chip at once: one per multiprocessor, no more.
"""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from neurojax.kernels import gpus
from neurojax.kernels.attention.reference import MASKED
from neurojax.kernels.decode import tuned
from neurojax.kernels.decode.shapes import Shape
from neurojax.kernels.decode.tiles import TILE, Ops, Unit, round_bits, store_planes
from neurojax.kernels.decode.weights import LayerWeights
from neurojax.weights.ternary import TernaryArray

_HEADS = 16
"""Rows of the smallest product that tensor cores do: the queries of a key-value head, padded."""
_LOG2E = 1.4426950408889634
_APART = 32
"""Counters of heads start here, on another cache line than the grid's."""


@dataclasses.dataclass(frozen=True)
class Product:
  """How the programs share one matrix: its columns are cut into chunks, its rows into units.

  Attributes:
    n, k: Rows and columns of the matrix.
    programs: Programs of the grid; those of a chunk share its rows.
    ahead: Bytes of codes that a program requests before it has what they are multiplied by.
    paired: Rows i and i + n/2 go to the same program, and its results are SwiGLU(i, i + n/2).
  """

  n: int
  k: int
  group: int
  programs: int
  ahead: int
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
    return Unit(rows=tuned.ROWS, tiles=tiles, parts=2 if self.paired else 1)

  @property
  def rounds(self) -> int:
    return -(-self.outputs // (tuned.ROWS * self.programs_per_chunk))

  @property
  def slots(self) -> int:
    """Units that are requested ahead."""
    return min(max(1, self.ahead // (self.unit.count * TILE // 4)), self.rounds)


class _Kernel:
  """The body of the kernel, with everything that is known when it is compiled."""

  def __init__(
    self,
    shape: Shape,
    *,
    layers: int,
    programs: int,
    capacity: int,
    head: int,
    groups: dict[str, int],
    qk_norm: bool,
    interpret: bool,
  ):
    s = shape
    self.shape, self.layers, self.programs, self.capacity = s, layers, programs, capacity
    self.qk_norm, self.ops = qk_norm, Ops(interpret)
    product = functools.partial(Product, programs=programs, ahead=tuned.AHEAD_BYTES)
    self.qkv = product((s.n + 2 * s.k) * s.h, s.d, groups["qkv"], ahead=tuned.AHEAD_QKV_BYTES)
    self.o = product(s.d, s.n * s.h, groups["o"])
    self.gate_up = product(2 * s.f, s.d, groups["gate_up"], paired=True)
    self.down = product(s.d, s.f, groups["down"])
    self.head = product(head, s.d, groups["head"]) if head else None
    # A program by itself takes several shares too, or nothing would be joined in interpret mode.
    self.splits = min(max(3, programs // s.k), -(-capacity // tuned.SHARE_KEYS))
    self.columns = -(-s.g * s.h // self.splits)
    sizes = {
      "x": s.d,
      "x_mid": s.d,
      "qkv": self.qkv.outputs,
      "sums": s.k * self.splits * s.g,
      "shares": s.k * self.splits * s.g * s.h,
      "attended": s.n * s.h,
      "o": self.o.chunks * s.d,
      "hidden": s.f,
      "tops": programs,
      "down": self.down.chunks * s.d,
    }
    starts = itertools.accumulate(sizes.values(), initial=0)
    *starts, self.scratch = starts
    self.starts = dict(zip(sizes, starts, strict=True))

  # --- weights -----------------------------------------------------------------------------------

  def _first(self, p: Product, index: Array | int) -> Array:
    """The first output of unit `index` of this program; one past the last if it has no such unit."""
    place = jnp.where(
      self.pid < p.chunks * p.programs_per_chunk, lax.div(self.pid, p.chunks), p.outputs
    )
    return (place + index * p.programs_per_chunk) * tuned.ROWS

  def _load(self, p: Product, refs, layer: Array, index: Array | int):
    """Load codes and scales of unit `index` of this program."""
    tile = lax.rem(self.pid, p.chunks) * p.unit.tiles
    return p.unit.load(*refs, layer, self._first(p, index), p.outputs, tile, p.group)

  def prefetch(self, p: Product, refs, layer: Array):
    return [self._load(p, refs, layer, i) for i in range(p.slots)]

  def _sums(self, p: Product, loaded, x, scale):
    """Compute the results of one unit, float32 [rows]."""
    codes, scales = loaded
    planes, x_sums = x
    sums = (self.ops.dot(codes, planes) - x_sums).astype(jnp.float32) * scales.astype(jnp.float32)
    y = p.unit.add_up(sums) * scale
    if not p.paired:
      return y.reshape(tuned.ROWS)
    part = lax.broadcasted_iota(jnp.int32, y.shape, 0)
    gate, up = [jnp.sum(jnp.where(part == i, y, 0), axis=0) for i in range(2)]
    return gate / (1 + jnp.exp2(gate * -_LOG2E)) * up

  def multiply(self, p: Product, refs, layer, slots, x, scale, post) -> Array:
    """Multiply this program's rows by x; returns the largest |result| of each row of a unit.

    Args:
      post: Called with indices of results, results, and which of them count.
    """
    first = lax.rem(self.pid, p.chunks) * p.outputs
    depth = len(slots)

    def put(index, loaded, top):
      y = self._sums(p, loaded, x, scale)
      rows = self._first(p, index) + jnp.arange(tuned.ROWS)
      inside = rows < p.outputs
      top = jnp.maximum(top, jnp.where(inside, _magnitude(y), 0))
      if self.ops.interpret:
        post(first + rows, y, inside)
        return top
      # In the layout that the sums have: any other would be a detour through shared memory.
      wide = jnp.broadcast_to(y[:, None], (tuned.ROWS, 32))
      row = self.ops.opaque(jnp.broadcast_to(rows[:, None], (tuned.ROWS, 32)))
      lane = lax.broadcasted_iota(jnp.int32, (tuned.ROWS, 32), 1)
      post(first + row, wide, (row < p.outputs) & (lane == 0))
      return top

    def body(j, carry):
      slots, top = carry
      fresh = []
      for i, slot in enumerate(slots):
        top = put(j * depth + i, slot, top)
        fresh.append(self._load(p, refs, layer, j * depth + i + depth))
      return fresh, top

    # Units past the last row request nothing and store nothing.
    turns = -(-p.rounds // depth)
    return lax.fori_loop(0, turns, body, (slots, jnp.zeros(tuned.ROWS, jnp.float32)))[1]

  # --- what programs tell each other ---------------------------------------------------------------

  def post(self, refs, name: str):
    """Make a function of indices, float32 values and a mask that writes what others will read."""

    def write(index: Array | int, value: Array, mask: Array) -> None:
      at = self.starts[name] + index
      if self.ops.interpret:
        # The interpreter writes what is masked out too: there it goes past the end.
        at = jnp.where(mask, at, self.scratch)
      plgpu.store(refs.scratch.at[at], value, mask=mask)

    return write

  def read(self, refs, name: str, index: Array | int, mask: Array) -> Array:
    """Read what others wrote before a barrier, float32, zeros where masked out."""
    at = refs.scratch.at[self.starts[name] + index]
    return plgpu.load(at, mask=mask, other=0.0, volatile=True)

  # --- activations -------------------------------------------------------------------------------

  def _quantise(self, p: Product, refs, v_K: Array, top: Array):
    """Round a chunk of a vector, whose largest magnitude is `top`, to int8.

    Returns: Planes and block sums, for `Ops.dot`; and the scale.
    """
    inverse = jnp.where(top > 0, 127 / top, 0.0)
    store_planes(refs.rounded, self.pid, round_bits(v_K * inverse))
    self._block_barrier()
    planes = p.unit.load_planes(refs.rounded, self.pid)
    return (planes, self.ops.block_sums(planes)), top * (1 / 127)

  def _residual(self, refs, x: str, name: str, parts: Product, keep, live=True) -> Array:
    """Add the chunks of a product to x: float32, zero from D on; program 0 keeps it.

    Args:
      keep: Called as the function that `post` makes.
      live: False in the first layer, whose input has no parts yet.
    """
    i = jnp.arange(_padded(self.shape.d))
    inside = i < self.shape.d
    v = self.read(refs, x, i, inside)
    for c in range(parts.chunks):
      v += self.read(refs, name, c * self.shape.d + i, inside & live)
    keep(i, v, inside & (self.pid == 0))
    return v

  def _gain(self, ref, layer: Array) -> Array:
    i = jnp.arange(_padded(self.shape.d))
    return plgpu.load(ref.at[layer, i], mask=i < self.shape.d, other=0.0)

  def _normalise(self, p: Product, refs, v: Array, gain: Array):
    """Normalise by RMSNorm and round to int8: planes and block sums, and the scale."""
    scaled = v * gain
    mean = jnp.sum(v * v) / self.shape.d
    x, scale = self._quantise(p, refs, scaled, jnp.max(jnp.abs(scaled)))
    return x, scale * lax.rsqrt(mean + self.shape.norm_eps)

  # --- attention ---------------------------------------------------------------------------------

  def _turning(self, refs, norm_ref, layer) -> tuple[Array, Array]:
    """Compute the factors of a head's elements and of their partners, float32 [1, H]: norm and rotation."""
    half = self.shape.h // 2
    i = jnp.arange(self.shape.h)[None, :]
    cos = plgpu.load(refs.cos.at[lax.rem(i, half)])
    sin = plgpu.load(refs.sin.at[lax.rem(i, half)])
    sin = jnp.where(i < half, -sin, sin)
    if norm_ref is None:
      return cos, sin
    scale = plgpu.load(norm_ref.at[layer, i])
    return cos * scale, sin * plgpu.load(norm_ref.at[layer, self._partner(i)])

  def _partner(self, i: Array) -> Array:
    half = self.shape.h // 2
    return jnp.where(i < half, i + half, i - half)

  def _turn(self, own: Array, other: Array, turning: tuple[Array, Array]) -> Array:
    """Normalise heads [R, H] if the family does that, and rotate them; other: elements' partners."""
    out = own * turning[0] + other * turning[1]
    if not self.qk_norm:
      return out
    mean = jnp.sum(own * own, axis=1, keepdims=True) / self.shape.h
    return out * lax.rsqrt(mean + self.shape.norm_eps)

  def _keys(self, refs, layer, head, first, end) -> tuple[Array, Array]:
    """Load keys and values [tuned.KEYS, H] from position `first` on; zeros from `end` on."""
    key = first + jnp.arange(tuned.KEYS)
    column = jnp.arange(self.shape.h)[None, :]
    mask = jnp.broadcast_to((key < end)[:, None], (tuned.KEYS, self.shape.h))
    at = (layer, self.slot, head, key[:, None], column)
    return tuple(plgpu.load(ref.at[at], mask=mask, other=0.0) for ref in (refs.keys, refs.values))

  def attention(self, layer, refs, position):
    """Attend in two parts: what can be requested before q, k and v are there, and the rest.

    Each program takes a share of the keys of one key-value head, then joins some columns of all.
    Returns: A function to call when q, k and v are there.
    """
    s, splits = self.shape, self.splits
    step = splits * tuned.SHARE_KEYS
    share = jnp.maximum(lax.div(position + step - 1, step) * tuned.SHARE_KEYS, tuned.LEAST_KEYS)
    active = jnp.maximum(lax.div(position + share - 1, share), 1)
    units = s.k * splits
    turning = [self._turning(refs, ref, layer) for ref in (refs.q_norm, refs.k_norm)]

    def place(u):
      head, split = lax.div(u, splits), lax.rem(u, splits)
      live = (u < units) & (split < active)
      first = split * share
      end = jnp.where(live, jnp.minimum(first + share, position), 0)
      return live, (head, split, first, end)

    def request(u):
      _, (head, _, first, end) = place(u)
      return self._keys(refs, layer, lax.rem(head, s.k), first, end)

    def attend(u, tiles):
      live, (head, *keys) = place(u)

      @pl.when(live)
      def _():
        self._attend_share(layer, refs, head, *keys, position, tiles, turning)
        self._count(refs.sync, _APART + layer * s.k + head)

    def join(u):
      pl.when(u < units)(
        lambda: self._join(layer, refs, lax.div(u, splits), lax.rem(u, splits), active)
      )

    if self.programs >= units:
      tiles = request(self.pid)

      def run():
        attend(self.pid, tiles)
        join(self.pid)

      return run

    def each(f):
      count = -(-units // self.programs)
      lax.fori_loop(0, count, lambda i, _: (f(self.pid + i * self.programs), 0)[1], 0)

    def run():
      each(lambda u: attend(u, request(u)))
      each(join)

    return run

  def _attend_share(self, layer, refs, head, split, first, end, position, tiles, turning):
    """Attend over keys first .. end of one head; the first share has the new key too, and stores it."""
    s = self.shape
    kind = refs.keys.dtype
    column = jnp.arange(s.h)[None, :]
    row = jnp.arange(_HEADS)[:, None]
    query = (head * s.g + row) * s.h
    key = jnp.broadcast_to((s.n + head) * s.h, (1, s.h))
    live = jnp.broadcast_to(row < s.g, (_HEADS, s.h))
    partner = self._partner(column)
    q, q_other = (self.read(refs, "qkv", query + at, live) for at in (column, partner))
    k, k_other, v = (
      self.read(refs, "qkv", key + at, key >= 0) for at in (column, partner, s.k * s.h + column)
    )
    q = (self._turn(q, q_other, turning[0]) * (s.h**-0.5 * _LOG2E)).astype(kind)
    k = self._turn(k, k_other, turning[1]).astype(kind)
    v = v.astype(kind)
    owner = split == 0

    @pl.when(owner)
    def _():
      at = (layer, self.slot, head, position + jnp.zeros((1, 1), jnp.int32), column)
      plgpu.store(refs.keys.at[at], k)
      plgpu.store(refs.values.at[at], v)

    score = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1)
    top = jnp.where(owner, score, MASKED)
    total = jnp.where(owner, jnp.ones(_HEADS, jnp.float32), 0.0)
    out = jnp.broadcast_to(jnp.where(owner, v.astype(jnp.float32), 0.0), (_HEADS, s.h))

    def block(i, carry):
      (k, v), top, total, out = carry
      at = first + i * tuned.KEYS
      seen = at + jnp.arange(tuned.KEYS) < end
      score = jnp.where(seen[None, :], _dot(q, k.T), MASKED)
      new_top = jnp.maximum(top, score.max(1))
      weight = jnp.exp2(score - new_top[:, None])
      weight = jnp.where(seen[None, :], weight, 0.0)
      shrink = jnp.exp2(top - new_top)
      out = out * shrink[:, None] + _dot(weight.astype(kind), v)
      tiles = self._keys(refs, layer, head, at + tuned.KEYS, end)
      return tiles, new_top, total * shrink + weight.sum(1), out

    count = lax.div(end - first + tuned.KEYS - 1, tuned.KEYS)
    _, top, total, out = lax.fori_loop(0, count, block, (tiles, top, total, out))
    r = jnp.arange(_HEADS)
    at = (head * self.splits + split) * s.g
    self.post(refs, "sums")(at + r, top + jnp.log2(total), r < s.g)
    self.post(refs, "shares")((at + row) * s.h + column, out / total[:, None], live)

  def _join(self, layer, refs, head, piece, active):
    """Average the shares of one head, for some of its columns."""
    s, width = self.shape, self.shape.g * self.shape.h
    self._wait_for(refs.sync, _APART + layer * s.k + head, active)
    split = jnp.arange(pl.next_power_of_2(self.splits))[:, None]
    c = jnp.arange(pl.next_power_of_2(self.columns))
    column = piece * self.columns + c
    inside = (c < self.columns) & (column < width)
    used = (split < active) & inside[None, :]
    share = head * self.splits + split
    sums = self.read(refs, "sums", share * s.g + lax.div(column, s.h)[None, :], used)
    shares = self.read(refs, "shares", share * width + column[None, :], used)
    sums = jnp.where(used, sums, MASKED)
    weight = jnp.where(used, jnp.exp2(sums - jnp.max(sums, axis=0)[None, :]), 0.0)
    total = jnp.where(inside, jnp.sum(weight, axis=0), 1.0)
    joined = jnp.sum(shares * weight, axis=0) / total
    self.post(refs, "attended")(head * width + column, joined, inside)

  # --- synchronisation ---------------------------------------------------------------------------

  def _block_barrier(self):
    if not self.ops.interpret:
      plgpu.debug_barrier()

  def _count(self, ref, at) -> None:
    """Count this program in: whoever sees the count sees what it wrote."""
    if self.ops.interpret:
      ref[at] = ref[at] + 1
      return
    # Imported when needed: it exists where the GPU's compiler does.
    from neurojax.kernels.decode import barrier

    barrier.arrive(ref, at, threads=32 * tuned.WARPS)

  def _wait_for(self, ref, at, target: Array) -> None:
    """Wait until a counter has reached `target`."""
    if self.ops.interpret:
      return
    from neurojax.kernels.decode import barrier

    barrier.wait(ref, at, target, threads=32 * tuned.WARPS)

  def arrive(self, refs) -> None:
    """Say that this program has written what the others wait for."""
    self._count(refs.sync, 0)

  def wait(self, refs, round_: Array) -> None:
    """Wait until all programs have arrived `round_` times."""
    self._wait_for(refs.sync, 0, round_ * self.programs)

  # --- the walk ----------------------------------------------------------------------------------

  def run(self, refs):
    s = self.shape
    # Read once: interpret mode knows no program inside a loop.
    self.pid = pl.program_id(0)
    self.slot = 0 if refs.slot is None else refs.slot[0]
    position = refs.position[0]
    zero = jnp.int32(0)

    def layer_step(layer, carry):
      slots, gain = carry
      post = functools.partial(self.post, refs)
      x = self._residual(refs, "x_mid", "down", self.down, post("x"), layer > 0)
      x, scale = self._normalise(self.qkv, refs, x, gain)
      self.multiply(self.qkv, refs.qkv, layer, slots, x, scale, post("qkv"))
      self.arrive(refs)
      attend = self.attention(layer, refs, position)
      self.wait(refs, 5 * layer + 1)
      attend()
      self.arrive(refs)
      slots = self.prefetch(self.o, refs.o, layer)
      self.wait(refs, 5 * layer + 2)

      i = jnp.arange(_padded(s.n * s.h))
      attended = self.read(refs, "attended", i, i < s.n * s.h)
      x, scale = self._quantise(self.o, refs, attended, jnp.max(_magnitude(attended)))
      self.multiply(self.o, refs.o, layer, slots, x, scale, post("o"))
      self.arrive(refs)
      gain = self._gain(refs.ffn_norm, layer)
      slots = self.prefetch(self.gate_up, refs.gate_up, layer)
      self.wait(refs, 5 * layer + 3)

      x = self._residual(refs, "x", "o", self.o, post("x_mid"))
      x, scale = self._normalise(self.gate_up, refs, x, gain)
      tops = self.multiply(self.gate_up, refs.gate_up, layer, slots, x, scale, post("hidden"))
      plgpu.store(refs.scratch.at[self.starts["tops"] + self.pid], jnp.max(tops))
      self.arrive(refs)
      slots = self.prefetch(self.down, refs.down, layer)
      self.wait(refs, 5 * layer + 4)

      lanes = jnp.arange(pl.next_power_of_2(self.programs))
      tops = self.read(refs, "tops", lanes, lanes < self.programs)
      chunk = _padded(min(s.f, self.down.unit.tiles * TILE))
      i = lax.rem(self.pid, self.down.chunks) * chunk + jnp.arange(chunk)
      hidden = self.read(refs, "hidden", i, i < s.f)
      x, scale = self._quantise(self.down, refs, hidden, jnp.max(tops))
      self.multiply(self.down, refs.down, layer, slots, x, scale, post("down"))
      self.arrive(refs)
      following = jnp.minimum(layer + 1, self.layers - 1)
      gain = self._gain(refs.attn_norm, following)
      slots = self.prefetch(self.qkv, refs.qkv, following)
      self.wait(refs, 5 * layer + 5)
      return slots, gain

    start = self.prefetch(self.qkv, refs.qkv, zero), self._gain(refs.attn_norm, zero)
    lax.fori_loop(0, self.layers, layer_step, start)
    if self.head:
      slots, gain = self.prefetch(self.head, refs.head, zero), self._gain(refs.final_norm, zero)

    def store_x(index, value, mask):
      plgpu.store(refs.x_out.at[index], value, mask=mask)

    x = self._residual(refs, "x_mid", "down", self.down, store_x)
    if not self.head:
      return

    def store_logits(index, value, mask):
      plgpu.store(refs.logits.at[index], value, mask=mask)

    x, scale = self._normalise(self.head, refs, x, gain)
    self.multiply(self.head, refs.head, zero, slots, x, scale, store_logits)


def _padded(width: int) -> int:
  """Elements of an array with whole tiles for `width`; Triton's sizes are powers of two."""
  return max(TILE, pl.next_power_of_2(width))


def _magnitude(v: Array) -> Array:
  """|v|, infinite for NaN: a maximum on the GPU passes over NaN, and rounding would make it finite."""
  return jnp.where(v == v, jnp.abs(v), jnp.inf)


def _dot(a: Array, b: Array) -> Array:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def why_not(weights: LayerWeights, capacity: int, programs: int) -> str | None:
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
    return f"a cache for {capacity} positions: offsets within a slot have 32 bits"
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
  slot: Array | None = None,
  final_norm: Array | None = None,
  head: TernaryArray | None = None,
  programs: int,
  interpret: bool = False,
) -> tuple[Array, Array | None, Array, Array]:
  """Run one token through the layers, and through final norm and head if they are given.

  Args:
    x_D: float32 [D], the input of the first layer.
    keys, values: bfloat16 [L, P, K, S, H]; position `position` of each layer is written.
    cos, sin: float32 [H / 2]: the rotation at this position.
    position: int32 scalar, below S.
    slot: int32 scalar, below P; None: 0.
    head: [D, V] or [V, D] as rows of V outputs.
    programs: Programs of the grid: one for each multiprocessor; 1 in interpret mode.
  Returns: x float32 [D] after the last layer, logits float32 [V] or None, keys, values.
  Raises: NotImplementedError: `why_not` or `gpus.why_not_jax` has a reason.
  """
  s = weights.shape
  if not interpret and (reason := gpus.why_not_jax()):
    raise NotImplementedError(reason)
  if interpret and programs != 1:
    raise NotImplementedError(f"{programs} programs in interpret mode: they run one after another")
  if reason := why_not(weights, keys.shape[3], programs):
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
    qk_norm=weights.q_norm is not None,
    interpret=interpret,
  )
  inputs = {"position": position.reshape(1), "cos": cos, "sin": sin}
  if slot is not None:
    inputs["slot"] = slot.reshape(1)
  inputs |= {"attn_norm": weights.attn_norm, "ffn_norm": weights.ffn_norm}
  if weights.q_norm is not None:
    inputs |= {"q_norm": weights.q_norm, "k_norm": weights.k_norm}
  if head is not None:
    inputs["final_norm"] = final_norm.reshape(1, -1)
  for name, m in matrices.items():
    inputs[f"{name}.codes"], inputs[f"{name}.scales"] = m.codes, m.scales
  sync = jnp.zeros(_APART + num_layers * s.k, jnp.int32)
  scratch = jnp.zeros(kernel.scratch + interpret, jnp.float32)
  scratch = lax.dynamic_update_slice(scratch, x_D, (kernel.starts["x_mid"],))
  shared = {"keys": keys, "values": values, "sync": sync, "scratch": scratch}
  widths = {"x_out": s.d}
  if kernel.head:
    widths["logits"] = kernel.head.outputs
  most = max(p.unit.tiles for p in (kernel.qkv, kernel.o, kernel.down))
  rounded = jax.ShapeDtypeStruct((programs, most * TILE), jnp.int8)
  names = [*inputs, *shared]
  outputs = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in shared.items()}
  outputs |= {name: jax.ShapeDtypeStruct((width,), jnp.float32) for name, width in widths.items()}
  outputs["rounded"] = rounded

  def body(*refs):
    given = dict(zip(names, refs[: len(names)], strict=True)) | dict(
      zip(outputs, refs[len(names) :], strict=True)
    )
    for name in matrices:
      given[name] = (given.pop(f"{name}.codes"), given.pop(f"{name}.scales"))
    absent = {"slot": None, "q_norm": None, "k_norm": None}
    kernel.run(types.SimpleNamespace(**(absent | given)))

  results = pl.pallas_call(
    body,
    grid=(programs,),
    out_shape=tuple(outputs.values()),
    input_output_aliases={len(inputs) + i: i for i in range(len(shared))},
    compiler_params=plgpu.CompilerParams(num_warps=tuned.WARPS, num_stages=1),
    interpret=interpret,
    name="ternary_decode",
  )(*inputs.values(), *shared.values())
  results = dict(zip(outputs, results, strict=True))
  logits = results.get("logits")
  return results["x_out"], logits, results["keys"], results["values"]


def _whole(m: TernaryArray) -> int:
  return m.codes.shape[-1] * 4

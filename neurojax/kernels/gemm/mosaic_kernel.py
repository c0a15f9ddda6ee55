"""The kernel of `mosaic`: one block's pipeline, unpacking, group sums and the transposed store.

A block computes `cut.n` channels of `cut.m` tokens. One warpgroup copies steps of `cut.k` contracted
elements into a ring of `cut.stages` slots of shared memory. The others each take a share of the
channels, unpack its codes into registers and multiply. Two barriers a slot say that it is full and
that it is free.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, scf, vector

from neurojax.kernels.gemm.mosaic_fragments import FRAGMENTS, ROWS

_COPY_REGISTERS = 40

_MAGIC = 0x4B400000
"""1.5 * 2**23 as float32 bits: an int32 sum below 2**22 that starts here ends as a float32."""


def launch(m, group, cut, dtype):
  """Make the kernel for m tokens: (x, codes, scales, [layer], [row_scales]) -> y, or its partial sums."""

  def call(x, codes, scales, layer, row_scales):
    n, k, size = codes.shape[1], x.shape[1], x.dtype.itemsize
    shape = (m, n) if cut.split == 1 else (cut.split, m, n)
    return plgpu.kernel(
      functools.partial(
        _block, m=m, k=k, group=group, cut=cut, stacked=bool(layer), rescaled=bool(row_scales)
      ),
      out_type=jax.ShapeDtypeStruct(shape, dtype if cut.split == 1 else jnp.float32),
      grid=(math.ceil(m / cut.m), n // cut.n, cut.split),
      grid_names=("m", "n", "split"),
      num_threads=cut.warpgroups + cut.copier,
      thread_name="wg",
      scratch_types=(
        _stages((cut.stages, cut.n, cut.k // 4), jnp.uint8, cut.k // 4),
        _stages((cut.stages, cut.m, cut.k), x.dtype, min(128, (group or 128) * size)),
        plgpu.Barrier(num_arrivals=2, num_barriers=cut.stages),
        plgpu.Barrier(num_arrivals=cut.warpgroups, num_barriers=cut.stages),
      ),
      compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(x, codes, scales, *layer, *row_scales)

  return call


def _stages(shape, dtype, swizzle):
  tile = (8, swizzle // jnp.dtype(dtype).itemsize)
  return plgpu.SMEM(
    shape, dtype, transforms=(plgpu.TilingTransform(tile), plgpu.SwizzleTransform(swizzle))
  )


def _block(x, codes, scales, *refs, m, k, group, cut, stacked, rescaled):
  """One warpgroup copies steps into shared memory, the others multiply them."""
  *rest, y, w_smem, x_smem, full, empty = refs
  layer = rest.pop(0)[0] if stacked else 0
  mi, ni, si, wg = (lax.axis_index(name) for name in ("m", "n", "split", "wg"))
  steps = k // cut.k // cut.split
  size = x.dtype.itemsize
  sums = jnp.int32 if size == 1 else jnp.float32
  unit = 1 / FRAGMENTS[size].unit

  def copy(i):
    slot = lax.rem(i, cut.stages)
    at = si * steps + i
    plgpu.copy_gmem_to_smem(
      codes.at[layer, pl.ds(ni * cut.n, cut.n), pl.ds(at * (cut.k // 4), cut.k // 4)],
      w_smem.at[slot],
      full.at[slot],
    )
    plgpu.copy_gmem_to_smem(
      x.at[pl.ds(mi * cut.m, cut.m), pl.ds(at * cut.k, cut.k)], x_smem.at[slot], full.at[slot]
    )

  def refill(i):
    plgpu.barrier_wait(empty.at[lax.rem(i, cut.stages)])
    copy(i)

  def copy_all():
    plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
    lax.fori_loop(0, min(cut.stages, steps), lambda i, _: copy(i), None)
    lax.fori_loop(cut.stages, steps, lambda i, _: refill(i), None)

  def multiply_all():
    height = cut.n // cut.warpgroups
    blocks = range(height // ROWS)

    def multiply(slot, r, accs, width, first):
      """Adds to each accumulator the next `width` contracted elements of row block r."""
      rows = pl.ds(wg * height + r * ROWS, ROWS)
      packed = plgpu.load(w_smem.at[slot, rows], layout=plgpu.Layout.WGMMA_8BIT)
      piece = min(width, 256)
      for a, acc in enumerate(accs):
        for start in range(first + a * width, first + (a + 1) * width, piece):
          w = _unpack(packed, start, piece, x.dtype)
          plgpu.wgmma(acc, w, x_smem.at[slot, :, pl.ds(start, piece)].T)
      plgpu.wgmma_wait(0)

    def over_steps(body, carry):
      def step(i, carry):
        if not cut.copier:
          # The slot of the step before is free once every warpgroup is past it.
          ahead = i + cut.stages - 1
          pl.when((wg == 0) & (i > 0) & (ahead < steps))(lambda: refill(ahead))
        slot = lax.rem(i, cut.stages)
        plgpu.barrier_wait(full.at[slot])
        carry = body(i, slot, carry)
        plgpu.barrier_arrive(empty.at[slot])
        return carry

      return lax.fori_loop(0, steps, step, carry)

    def whole(*accs):
      def body(_, slot, carry):
        for r in blocks:
          multiply(slot, r, [accs[r]], cut.k, 0)
        return carry

      over_steps(body, None)
      scale = scales[layer, 0, 0].astype(jnp.float32) * unit
      return [acc[...].astype(jnp.float32) * scale for acc in accs]

    def grouped(i, slot, totals):
      width = min(group, cut.k)
      together = min(cut.k // width, max(1, 128 // cut.m))
      out = []
      for r in blocks:
        total = totals[r]
        rows = pl.ds(ni * cut.n + wg * height + r * ROWS, ROWS)
        for first in range(0, cut.k, together * width):

          def batch(*accs, r=r, first=first):
            if size == 1:
              for acc in accs:
                acc[...] = plgpu.layout_cast(
                  jnp.full(acc.shape, _MAGIC, jnp.int32), plgpu.Layout.WGMMA
                )
            multiply(slot, r, accs, width, first)
            return [acc[...] for acc in accs]

          values = pl.run_scoped(batch, *[plgpu.ACC((ROWS, cut.m), sums)] * together)
          for a, value in enumerate(values):
            g = ((si * steps + i) * cut.k + first + a * width) // group
            scale = plgpu.load(
              scales.at[layer, rows, g], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
            )
            if size == 1:
              value = lax.bitcast_convert_type(value, jnp.float32) - 1.5 * 2**23
            scale = lax.broadcast_in_dim(scale.astype(jnp.float32) * unit, value.shape, (0,))
            total = total + value * scale
        out.append(total)
      return out

    if group is None:
      totals = pl.run_scoped(whole, *[plgpu.ACC((ROWS, cut.m), sums) for _ in blocks])
    else:
      zeros = jnp.zeros((ROWS, cut.m), jnp.float32)
      totals = over_steps(grouped, [plgpu.layout_cast(zeros, plgpu.Layout.WGMMA) for _ in blocks])
    for r in blocks:
      total = totals[r]
      if rescaled:
        tokens = plgpu.load(
          rest[0].at[pl.ds(mi * cut.m, cut.m)], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
        )
        total = total * lax.broadcast_in_dim(tokens, total.shape, (1,))
      _store(
        y if cut.split == 1 else y.at[si],
        total.astype(y.dtype),
        mi * cut.m,
        ni * cut.n + wg * height + r * ROWS,
        m if m % cut.m else None,
      )

  if cut.copier:
    pl.when(wg == cut.warpgroups)(copy_all)

    @pl.when(wg < cut.warpgroups)
    def _():
      plgpu.set_max_registers(_registers(cut.warpgroups), action="increase")
      multiply_all()

  else:

    @pl.when(wg == 0)
    def _():
      lax.fori_loop(0, min(cut.stages, steps), lambda i, _: copy(i), None)

    multiply_all()


def _registers(warpgroups):
  """Registers of a thread that multiplies: what the launch allots to a block, less the copier's."""
  launched = 65536 // (128 * (warpgroups + 1)) // 8 * 8 * (warpgroups + 1)
  return min(240, (launched - _COPY_REGISTERS) // warpgroups // 8 * 8)


def _unpack(packed, start, count, dtype):
  """Unpack contracted elements [start, start + count) of 64 rows of codes, in the order of `permute`."""
  size = jnp.dtype(dtype).itemsize
  layout = plgpu.Layout.WGMMA if size == 2 else plgpu.Layout.WGMMA_8BIT
  fragment = FRAGMENTS[size]

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA_8BIT,),
    return_type=plgpu.ShapeDtypeStruct((ROWS, count), dtype, layout),
  )
  def unpack(_, codes):
    lanes = ir.VectorType.get((4 // size,), mgpu.utils.dtype_to_ir_type(dtype))
    # One register: four bytes of a block of 16; rows r and r + 8 of the thread.
    words = codes.registers.reshape(-1, 2)[start // 64 : (start + count) // 64]
    out = np.empty(layout.to_mgpu().registers_shape((ROWS, count)), dtype=object)
    tiles = out.reshape(len(words), len(fragment.shifts), 2)
    keep, flip = _word(fragment.keep), _word(fragment.flip)
    for block, i, row in np.ndindex(tiles.shape):
      word = mgpu.utils.bitcast(words[block, row], _i32())
      top = arith.andi(arith.shli(word, _word(fragment.shifts[i])), keep)
      tiles[block, i, row] = mgpu.utils.bitcast(arith.xori(top, flip), lanes)
    return mgpu.FragmentedArray(
      _registers=out, _layout=layout.to_mgpu(), _is_signed=mgpu.utils.is_signed(dtype)
    )

  return unpack(packed)


def _store(y, value, token, channel, tokens):
  """Store y[token + j, channel + i] = value[i, j]; only rows of y below `tokens`, if it is given."""
  splat = plgpu.Layout.WG_SPLAT(())

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, splat, splat))
  def store(_, y, value, token, channel):
    index = ir.IndexType.get()
    thread = arith.remui(mgpu.utils.thread_idx(), _word(128))
    lane = arith.remui(thread, _word(32))
    row = arith.addi(
      arith.muli(arith.divui(thread, _word(32)), _word(16)), arith.divui(lane, _word(4))
    )
    row = arith.addi(row, channel.registers.item())
    column = arith.addi(arith.muli(arith.remui(lane, _word(4)), _word(2)), token.registers.item())
    registers = value.registers.reshape(-1, 2)
    for q, e in np.ndindex(len(registers), 2):
      at = arith.addi(column, _word(8 * q + e))

      def write(at=at, q=q, e=e):
        for half in range(2):
          element = vector.extract(
            registers[q, half],
            dynamic_position=[],
            static_position=ir.DenseI64ArrayAttr.get([e]),
          )
          place = [at, arith.addi(row, _word(8 * half))]
          memref.store(element, y, [arith.index_cast(index, i) for i in place])

      if tokens is None:
        write()
      else:
        inside = arith.cmpi(arith.CmpIPredicate.slt, at, _word(tokens))
        with ir.InsertionPoint(scf.IfOp(inside).then_block):
          write()
          scf.yield_([])

  store(y, value, token, channel)


def _i32():
  return ir.IntegerType.get_signless(32)


def _word(bits):
  return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), int(np.uint32(bits).view(np.int32))))

"""What is read in assembly, on kernels that one can count by hand."""

import pytest

from tests.kernels import aot

PTX = """
.version 9.0
.visible .entry kernel(
	.param .u64 kernel_param_0
)
.reqntid 64, 1, 1
{
	.reg .b32 	%r<9>;
	.loc	1 71 0
	ld.param::entry.b64 	%rd1, [kernel_param_0];
	@%p1 bra 	$L__BB0_2;
	// begin inline asm
	{ .reg .b32 t; and.b32 t, %r1, 3; dp4a.u32.s32 %r2, t, %r3, 0; } // dp4a.u32.s32 a, b, c, d;
	// end inline asm
$L__BB0_1:
	ld.global.L1::evict_first.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd2 + 0 ];
	dp4a.s32.s32 %r2, %r3, %r4, 0;
	@!%p2 bra 	$L__BB0_1;
	{
	LAB_WAIT:
	@p bra DONE;
	bra LAB_WAIT;
	DONE:
	}
	dp4a.u32.s32 %r2, %r3, %r4, 0;
	dp4a.u32.s32 %r2, %r3, %r4, 0;
	add.s32 %r1, %r2, %r3;
$L__BB0_2:
	ret;
}
"""


def test_only_blocks_with_a_product_are_counted():
  assert aot.instructions_per_weight(PTX, "dp4a.u32.s32") == (2 + 3) / (4 + 8)
  assert aot.instructions_per_weight(PTX, "dp4a.s32.s32") == 3 / 4


@pytest.mark.parametrize(
  ("name", "weights"),
  [
    ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", 16),
    ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 8),
    ("wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8", 16),
    ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", 8),
  ],
)
def test_a_matrix_instruction_says_how_many_weights_it_has(name, weights):
  ptx = f".entry kernel() {{ {name} {{%r1, %r2}}, {{%r3}}, %rd1, p; ret; }}"
  assert aot.instructions_per_weight(ptx, name.split(".")[0]) == 2 / weights


def test_what_is_not_there_is_an_error():
  with pytest.raises(AssertionError, match=r"no wgmma\.mma_async"):
    aot.instructions_per_weight(PTX, "wgmma.mma_async")
  with pytest.raises(AssertionError, match="nothing of spills"):
    aot.spills("ptxas info    : 0 bytes gmem")


def test_spills_of_all_kernels_are_added_up():
  line = "    592 bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
  assert aot.spills(line.format(0, 0)) == 0
  assert aot.spills(line.format(0, 8) + line.format(4, 0)) == 12

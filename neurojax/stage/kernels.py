"""Which kernels fused programs are made of."""

from dataclasses import dataclass
from typing import Literal

Product = Literal["reference", "mosaic", "dense"]


@dataclass(frozen=True)
class Kernels:
  """The kernels that a program is made of. Static, so that each choice is a program of its own.

  Attributes:
    product: "mosaic" multiplies by packed weights; "dense" writes them out, one matrix at a time,
      for cuBLAS; "reference" is slow and runs anywhere.
    device: The device kind whose table of tuned products is read: where it names Triton for a shape,
      that multiplies in place of "mosaic". None: no table.
    attention: "gpu" takes cuDNN for whole prompts and Triton over the cache; "reference" runs
      anywhere.
    programs: Multiprocessors that the kernel for a single token fills; 0: no such kernel, and one
      sequence is a batch of one. It rounds activations, so it is for "w2a8" only.
    invariant: Take products and norms whose sums have one order for any number of rows, so that a
      row's bits follow neither what runs beside it nor the length of a chunk; docs/kernels.md says
      for which weights. The kernel for a single token is another choice: `programs` = 0 leaves it out.
    rounds: Round activations of "w2a8" by kernels that also do what comes before, where the product is
      "mosaic" and attention "gpu"; else XLA rounds them, in several passes.
    unroll: Write layers one after the other into the program: one graph for all, but more to compile.
    interpret: Run the kernel for a single token in interpret mode.
  """

  product: Product = "mosaic"
  attention: Literal["reference", "gpu"] = "gpu"
  device: str | None = None
  programs: int = 0
  invariant: bool = False
  rounds: bool = True
  unroll: bool = False
  interpret: bool = False


REFERENCE = Kernels("reference", "reference")

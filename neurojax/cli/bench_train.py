"""`neurojax bench train`: the speed of a training step."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from neurojax.cli.console import stderr


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
  """Measure a training step of a named architecture on random tokens: its time, tokens/s and MFU.

  Each setting is measured first with bfloat16 weights, as the twin has, and then with each ternary
  recipe, in one run. FLOPs are 6 N + causal attention; what the backward pass computes again does
  not count.

  Example: neurojax bench train --arch neurollm-350m --batch 8 16 --remat dots none
  Example: neurojax bench train --arch neurollm-1b --batch 4 8 --group-size 256 --activations none int8
  """

  arch: Annotated[str, tyro.conf.arg(metavar="NAME|TOML")]
  """An architecture of configs/model, or a TOML file."""
  batch: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (8,)
  """Sequences of one pass over all devices."""
  seq_len: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 2048
  """Tokens of one sequence."""
  accumulation: Annotated[int, tyro.conf.arg(metavar="PASSES")] = 1
  """Passes whose gradients are added for one step."""
  remat: tuple[Literal["none", "dots", "full"], ...] = ("dots",)
  """How much the backward pass computes again: nothing, all but matrix products, or whole layers."""
  unroll: Annotated[tuple[int, ...], tyro.conf.arg(metavar="LAYERS ...")] = (1,)
  """Layers in one turn of the loop over layers."""
  group_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (128,)
  """Weights that share a scale in the ternary recipes; 0 is one scale for a whole matrix."""
  activations: tuple[Literal["none", "int8"], ...] = ("int8",)
  """Rounding of activations in the ternary recipes."""
  optimizer: Literal["adamw", "muon"] = "adamw"
  """Optimizer of the step."""
  attention: Literal["auto", "einsum", "cudnn"] = "auto"
  """Implementation of attention."""
  data: Annotated[int, tyro.conf.arg(metavar="DEVICES")] = 1
  """Devices along the data axis."""
  fsdp: Annotated[int, tyro.conf.arg(metavar="DEVICES")] = 1
  """Devices along the fsdp axis."""
  tensor: Annotated[int, tyro.conf.arg(metavar="DEVICES")] = 1
  """Devices along the tensor axis."""
  steps: Annotated[int, tyro.conf.arg(metavar="N")] = 5
  """Steps of each repetition."""
  repetitions: Annotated[int, tyro.conf.arg(metavar="N")] = 3
  """Number of times that each setting is measured."""
  out: Annotated[Path | None, tyro.conf.arg(metavar="CSV")] = None
  """Append the rows to this file; made with a header if it is not there."""
  json: bool = False
  """Print one JSON object."""

  def run(self) -> int:
    for name in ("batch", "remat", "unroll"):
      if not getattr(self, name):
        raise ValueError(f"nothing to measure: give a --{name}")
    for name, values in (
      ("batch", self.batch), ("unroll", self.unroll), ("steps", (self.steps,)),
      ("repetitions", (self.repetitions,)),
    ):  # fmt: skip
      if min(values) < 1:
        raise ValueError(f"--{name} {min(values)}: at least 1")

    from neurojax.config import ModelConfig
    from neurojax.kernels import timing
    from neurojax.layout import Layout
    from neurojax.measure.speed import train
    from neurojax.train.config import Quantization

    recipes = [Quantization()] + [
      Quantization(weights="ternary", group_size=size or None, activations=activations)
      for size, activations in itertools.product(self.group_size, self.activations)
    ]
    if self.out:
      timing.check_csv(self.out, train.Row)
    rows = []
    with stderr.status("measuring"):
      for row in train.run(
        ModelConfig.named(self.arch),
        arch=Path(self.arch).stem if self.arch.endswith(".toml") else self.arch,
        batches=self.batch,
        seq_len=self.seq_len,
        accumulation=self.accumulation,
        remats=self.remat,
        unrolls=self.unroll,
        recipes=recipes,
        optimizer=self.optimizer,
        attention=self.attention,
        where=Layout(data=self.data, fsdp=self.fsdp, tensor=self.tensor),
        steps=self.steps,
        runs=self.repetitions,
        skipped=stderr.print,
      ):
        rows.append(row)
        if self.out:
          timing.append_csv(self.out, [row])
    if not rows:
      raise ValueError("no setting fits the device: give a smaller --batch, or --remat full")
    if self.json:
      print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}))
    else:
      print(train.describe(rows))
    return 0

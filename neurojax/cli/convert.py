"""`neurojax convert` writes a model file in another format or type."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from neurojax.cli.console import progress, stderr
from neurojax.cli.options import ModelOptions

if TYPE_CHECKING:
  from neurojax.files.write.tensors import Converted

Kind = Literal[
  "TQ2_0",
  "TQ1_0",
  "Q2_0",
  "Q2_0_g128",
  "F32",
  "F16",
  "BF16",
  "Q8_0",
  "Q4_0",
  "Q4_1",
  "Q5_0",
  "Q5_1",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(ModelOptions):
  """Write a model as GGUF, or as a folder for transformers (config.json and safetensors).

  Without --type every tensor keeps its own type, or gets the narrowest type of the new format that
  holds its numbers exactly. A ternary type keeps ternary weights as they are and rounds other
  weights to the nearest ternary ones; what that changes is printed. Tokenizer, chat template, name
  and license are carried over. NaN and infinity are refused with their tensor and place.

  Example: neurojax convert --model neurollm --out neurollm-folder
  """

  out: Annotated[Path, tyro.conf.arg(metavar="FILE.gguf|FOLDER")]
  """A GGUF file if the name ends in .gguf, else a new folder. Nothing is replaced."""
  type: Kind | None = None
  """Type of all matrices of layers in GGUF; llama.cpp reads all but Q2_0_g128, which PrismML's fork
  reads. In a folder, type of all tensors: F32, F16 or BF16."""
  outer_type: Kind | None = None
  """Type of embedding and head in GGUF."""
  name: str | None = None
  """Name of the model in the file."""
  license: Annotated[str | None, tyro.conf.arg(metavar="SPDX")] = None
  """License of the model in the file, as an SPDX identifier."""

  def run(self) -> int:
    is_gguf = self.out.suffix.lower() == ".gguf"
    if not is_gguf and self.outer_type is not None:
      raise ValueError("--outer-type is for GGUF: let --out end in .gguf, or leave it away")
    if self.out.suffix.lower() in (".safetensors", ".bin", ".pt", ".pth", ".onnx"):
      raise ValueError(f"--out {self.out}: name a folder, or a file that ends in .gguf")
    from neurojax.files.write.folder import to_folder
    from neurojax.files.write.gguf import to_gguf

    general = {
      f"general.{key}": value
      for key, value in (("name", self.name), ("license", self.license))
      if value is not None
    }
    with self.open() as file, progress() as bars:
      bar = bars.add_task("writing tensors")

      def advance(done: int, total: int) -> None:
        bars.update(bar, completed=done, total=total)

      if is_gguf:
        made = to_gguf(
          file, self.out, kind=self.type, outer=self.outer_type, general=general, progress=advance
        )
      else:
        made = to_folder(file, self.out, kind=self.type, general=general, progress=advance)
    files = [self.out] if is_gguf else sorted(self.out.iterdir())
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(made.types.items()))
    print(f"{self.out}: {made.architecture}, {types}, {megabytes:.2f} MB; {made.loss}")
    say_notes(made)
    return 0


def say_notes(made: "Converted") -> None:
  """Print what the user should know about a file that was written, on stderr."""
  for note in made.notes:
    stderr.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)

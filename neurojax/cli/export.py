"""`neurojax export` writes the model of a training run as a file that others read."""

import asyncio
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from neurojax.cli.console import progress, stderr
from neurojax.cli.convert import say_notes
from neurojax.cli.options import EngineOptions, open_engine
from neurojax.cli.text import read_text

if TYPE_CHECKING:
  from neurojax.files.write.parameter_source import ParameterSource
  from neurojax.measure.quality.perplexity import PerplexityResult
  from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

_FOREIGN = (".safetensors", ".bin", ".pt", ".pth", ".onnx")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
  """Write the model of a training run as GGUF, or as a folder for transformers.

  Ternary matrices keep the exact codes and scales of training: a type that cannot hold them is
  refused. A folder holds plain numbers, in bfloat16 if that changes none of them, else in float32.
  The file says if training rounded activations to int8.

  Example: neurojax export --workdir runs/tiny --out tiny.gguf
  """

  workdir: Annotated[Path, tyro.conf.arg(metavar="DIR")]
  """The folder of the training run."""
  out: Annotated[Path, tyro.conf.arg(metavar="FILE.gguf|FOLDER")]
  """A GGUF file if the name ends in .gguf, else a new folder."""
  step: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """Step of the checkpoint. Without it, the newest."""
  type: Literal["TQ2_0", "TQ1_0", "Q2_0", "Q2_0_g128", "F32", "F16", "BF16"] | None = None
  """Type of the ternary matrices in GGUF. Without it, the first of TQ2_0 and Q2_0 that holds them.
  llama.cpp reads all but Q2_0_g128, which PrismML's fork reads. If the model is not ternary, type
  of all its matrices, which are rounded to it."""
  dtype: Literal["float32", "bfloat16"] | None = None
  """Type of all tensors in a folder."""
  tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE|FOLDER")] = None
  """A model file, a tokenizer.json or prepared data with the vocabulary, if the training run's own
  data are not at hand."""
  text: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
  """Also measure the perplexity of this text, with the checkpoint and with the GGUF file, as
  `neurojax eval ppl` does. Exit code 1 if the two differ by more than 1e-4 of their value."""
  ctx: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 512
  """Tokens of one window of --text."""
  chunks: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """Score only the first N windows of --text."""
  name: str | None = None
  """Name of the model in the file. Without it, the name of the training run's folder."""
  license: Annotated[str | None, tyro.conf.arg(metavar="SPDX")] = None
  """License of the model in the file, as an SPDX identifier."""
  description: str | None = None
  """Description of the model in the file."""
  author: str | None = None
  """Author of the model in the file."""
  url: str | None = None
  """Web address of the model in the file."""
  overwrite: bool = False
  """Replace the file or folder that an earlier export wrote."""

  def run(self) -> int:
    self._check()
    from neurojax.files.write.folder import KINDS
    from neurojax.files.write.transformers_config import CLASSES
    from neurojax.train.exported import export

    text = None if self.text is None else read_text(self.text, "--text")
    with progress() as bars:
      bar = bars.add_task("reading the checkpoint", total=None)

      def advance(done: int, total: int) -> None:
        bars.update(bar, description="writing tensors", completed=done, total=total)

      exported = export(
        self.workdir, self.out, step=self.step, type=self.type, dtype=self.dtype,
        tokenizer=self.tokenizer, overwrite=self.overwrite, progress=advance,
        said={
          key: getattr(self, key) for key in ("name", "license", "description", "author", "url")
        },
      )  # fmt: skip
    source, made = exported.source, exported.made
    say_notes(made)
    is_gguf = self.out.suffix.lower() == ".gguf"
    if is_gguf:
      what = f"{made.architecture}, {made.kind}"
    else:
      what = f"{CLASSES[made.architecture]}, {KINDS[made.kind]}"
    files = [self.out] if is_gguf else sorted(self.out.iterdir())
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    print(f"{self.out}: step {exported.step} of {self.workdir}, {what}, {megabytes:.2f} MB")
    if source.activations == "int8" and is_gguf:
      print("made for activations rounded to int8, as --weights auto runs it")
    if text is None:
      return 0
    form = "dense" if source.activations is None else "w2a8"
    assert source.tokenizer is not None
    return asyncio.run(self._compare(source, source.tokenizer, text, form))

  def _check(self) -> None:
    """Raises: ValueError: options that do not go together, or something in the way."""
    to_gguf = self.out.suffix.lower() == ".gguf"
    if self.out.suffix.lower() in _FOREIGN:
      raise ValueError(f"--out {self.out}: name a folder, or a file that ends in .gguf")
    if to_gguf and self.dtype is not None:
      raise ValueError(f"--dtype {self.dtype} is for a folder: GGUF has --type")
    if not to_gguf and (self.type is not None or self.text is not None):
      option = "--type" if self.type is not None else "--text"
      raise ValueError(f"{option} is for GGUF: let --out end in .gguf, or leave {option} away")
    if to_gguf and self.out.exists() and not self.overwrite:
      raise ValueError(f"--out {self.out} exists: name another file, or give --overwrite")

  async def _compare(
    self,
    source: "ParameterSource",
    spec: "TokenizerSpec",
    text: str,
    form: Literal["dense", "w2a8"],
  ) -> int:
    """The perplexity of a text before and after the export."""
    from neurojax.engine.local import LocalEngine
    from neurojax.files.open import open_model
    from neurojax.measure.quality.perplexity import perplexity
    from neurojax.stage.compile import CompiledStage
    from neurojax.tokenizer.tokenizer import Tokenizer

    async def measure(engine) -> "PerplexityResult":
      return await perplexity(engine, Tokenizer(spec), text, ctx=self.ctx, chunks=self.chunks)

    with stderr.status("measuring perplexity before and after"):
      stage = CompiledStage(
        source.model(None if form == "dense" else form), context_length=self.ctx
      )
      engine = LocalEngine(stage)
      try:
        before = await measure(engine)
      finally:
        await engine.close()
      with open_model(self.out) as file:
        async with open_engine(file, EngineOptions(context=self.ctx, weights=form)) as engine:
          after = await measure(engine)
    print(
      f"perplexity of {self.text}, {after.tokens} tokens: {before.perplexity:.6f} from the"
      f" checkpoint, {after.perplexity:.6f} from {self.out}"
    )
    return 0 if abs(after.perplexity - before.perplexity) <= 1e-4 * before.perplexity else 1

"""`neurojax eval golden`, `neurojax eval ppl` and `neurojax eval logits`."""

import asyncio
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from neurojax.cli.console import progress, stderr
from neurojax.cli.options import (
  EngineOptions,
  ModelOptions,
  check_max_tokens,
  check_out,
  open_engine,
  open_tokenizer,
)
from neurojax.cli.text import read_text
from neurojax.forms import Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Golden(ModelOptions, EngineOptions):
  """Compare greedy answers with known ones, token by token, or make the file of known ones.

  A differing token is excused where the known margin (the log-probability of the token minus that of
  the runner-up) is below 0.02 nats; what follows it in that case is not judged. Exit code 0 only if
  all cases agree.

  Example: neurojax eval golden --model neurollm --golden golden.json --make

  Example: neurojax eval golden --model neurollm --golden golden.json --stages 3
  """

  golden: Annotated[Path, tyro.conf.arg(metavar="JSON")]
  """The golden file: cases with prompt, prompt_tokens, tokens, logprobs and margins."""
  make: bool = False
  """Write the golden file instead: greedy answers of this engine, with the digest of the model file,
  versions and the date."""
  prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
  """With --make: a UTF-8 text with one prompt on each line; eight built-in prompts if absent."""
  max_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 32
  """With --make: most tokens of each answer, which a stop token ends earlier."""
  overwrite: bool = False
  """With --make: replace a golden file that exists."""
  tolerance: Annotated[float, tyro.conf.arg(metavar="NATS")] = 0.003
  """Largest difference of a log-probability that is still equal, natural logarithms."""
  json: bool = False
  """Print one JSON object."""

  def run(self) -> int:
    return asyncio.run(self._make() if self.make else self._evaluate())

  async def _make(self) -> int:
    from neurojax.api.opening import resolve
    from neurojax.measure.quality.golden import PROMPTS, make, read_prompts, write_golden

    check_new("--golden", self.golden, overwrite=self.overwrite)
    check_max_tokens(self.max_tokens)
    prompts = PROMPTS if self.prompts is None else read_prompts(self.prompts)
    with self.open() as file:
      tokenizer = open_tokenizer(file)
      sha256 = file.sha256()
      async with open_engine(file, self) as engine:
        with progress() as bars:
          cases = [
            await make(engine, tokenizer, prompt, max_tokens=self.max_tokens)
            for prompt in bars.track(prompts, description="prompts")
          ]
        serving = resolve(file, self.serving())
        held = {
          "dtype": serving.dtype,
          "weights": serving.weights,
          "programs": serving.programs,
          "stages": len(await engine.reports()),
        }
      write_golden(self.golden, cases, file=file.path.name, sha256=sha256, engine=held)
    tokens = sum(len(case.tokens) for case in cases)
    if self.json:
      print(json.dumps({"golden": str(self.golden), "cases": len(cases), "tokens": tokens}))
    else:
      print(f"{self.golden}: {len(cases)} cases with {tokens} tokens")
    return 0

  async def _evaluate(self) -> int:
    from neurojax.measure.quality.golden import judge, read_golden

    if self.prompts is not None or self.overwrite:
      raise ValueError("--prompts and --overwrite make a golden file: give --make too")
    if not self.tolerance >= 0:
      raise ValueError(f"--tolerance {self.tolerance}: at least 0")
    golden = read_golden(self.golden)
    with self.open() as file:
      if golden.sha256 and golden.sha256 != file.sha256():
        raise ValueError(
          f"{self.golden} was made from a file with sha256 {golden.sha256[:12]}..., "
          f"{file.path} has {file.sha256()[:12]}...: take the file it names ({golden.file})"
        )
      tokenizer = open_tokenizer(file)
      async with open_engine(file, self) as engine:
        with progress() as bars:
          cases = bars.track(golden.cases, description="cases")
          verdicts = [
            await judge(engine, tokenizer, case, tolerance=self.tolerance) for case in cases
          ]
    passed = sum(verdict.ok for verdict in verdicts)
    if self.json:
      rows = [dataclasses.asdict(verdict) for verdict in verdicts]
      print(json.dumps({"passed": passed, "cases": rows}, ensure_ascii=False))
    else:
      table = Table()
      for name in (
        "",
        "prompt",
        "tokens equal",
        "first difference (margin)",
        "largest log-prob difference",
        "note",
      ):
        table.add_column(name)
      for verdict in verdicts:
        apart = (
          ""
          if verdict.first_difference is None
          else f"{verdict.first_difference} ({verdict.margin:.5f})"
        )
        table.add_row(
          "[green]ok[/]" if verdict.ok else "[red]no[/]",
          repr(verdict.prompt)[:48],
          f"{verdict.equal}/{verdict.length}",
          apart,
          f"{verdict.logprob_difference:.5f}",
          verdict.note,
        )
      console = Console()
      console.print(table)
      console.print(f"{passed} of {len(verdicts)} cases agree")
    return 0 if passed == len(verdicts) else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(ModelOptions, EngineOptions):
  """Measure the perplexity of a text.

  Without --stride the method is llama.cpp's: windows of --ctx tokens that do not overlap, the first
  token of each replaced by BOS where the model wants one, the second half of each scored. With
  --stride S windows start every S tokens, and each scores only what no window before it scored.

  Example: neurojax eval ppl --model neurollm --text README.md --ctx 256 --chunks 8
  """

  text: Annotated[Path, tyro.conf.arg(metavar="FILE")]
  """The text to score, in UTF-8."""
  ctx: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 512
  """Tokens of a window, at least 4."""
  stride: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
  """Tokens from the start of one window to that of the next; llama.cpp's windows if absent."""
  chunks: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """Score only the first N windows; all if absent."""
  json: bool = False
  """Print one JSON object with perplexity, nll, stderr, tokens and windows."""

  def run(self) -> int:
    return asyncio.run(self._evaluate())

  async def _evaluate(self) -> int:
    from neurojax.measure.quality.perplexity import check_windows, perplexity

    check_windows(ctx=self.ctx, stride=self.stride, chunks=self.chunks)
    if self.context is not None and self.ctx > self.context:
      raise ValueError(f"--ctx {self.ctx}: the engine's context is {self.context} (--context)")
    text = read_text(self.text, "--text")
    with self.open() as file:
      tokenizer = open_tokenizer(file)
      if self.ctx > file.config.context_length:
        raise ValueError(f"--ctx {self.ctx}: the model was made for {file.config.context_length}")
      options = dataclasses.replace(
        self, context=self.ctx if self.context is None else self.context
      )
      async with open_engine(file, options) as engine:
        with progress() as bars:
          bar = bars.add_task("windows", total=None)

          def advance(done: int, total: int, so_far: float) -> None:
            bars.update(bar, completed=done, total=total, description=f"perplexity {so_far:.4f}")

          result = await perplexity(
            engine,
            tokenizer,
            text,
            ctx=self.ctx,
            stride=self.stride,
            chunks=self.chunks,
            progress=advance,
          )
    if self.json:
      print(json.dumps(dataclasses.asdict(result)))
    else:
      print(
        f"perplexity {result.perplexity:.4f} +- {result.stderr:.4f}  "
        f"(nll {result.nll:.5f} over {result.tokens} tokens in {result.windows} windows)"
      )
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logits(ModelOptions):
  """Write the logits after each token of a list, to compare with another implementation's.

  The file is a float32 array of NumPy, with a row for each token. Positions beyond the context that the
  model was made for are computed too.

  Example: neurojax eval logits --model neurollm --tokens ids.json --out logits.npy --decode-from 48
  """

  tokens: Annotated[Path, tyro.conf.arg(metavar="JSON")]
  """A list of token ids, as `neurojax tokenize --json` gives; nothing is added to it."""
  out: Annotated[Path, tyro.conf.arg(metavar="NPY")]
  """The file to write, by exactly this name."""
  overwrite: bool = False
  """Replace the file if it exists."""
  decode_from: Annotated[int | None, tyro.conf.arg(metavar="K")] = None
  """Feed the tokens from the K-th on (the first is 0) one at a time, and those before it as a prompt;
  all are a prompt if absent."""
  stages: Annotated[int, tyro.conf.arg(metavar="N")] = 1
  """Cut the layers into N stages, all in this process."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Floating-point type of activations and caches, and of dense weights."""
  weights: Weights | Literal["auto"] = "auto"
  """Form of the matrices, as for `neurojax generate`."""
  programs: Literal["auto", "model", "fused"] = "auto"
  """Programs that run the stages, as for `neurojax generate`."""

  def run(self) -> int:
    check_new("--out", self.out, overwrite=self.overwrite)
    import jax.numpy as jnp
    import numpy as np

    from neurojax.api.opening import resolve
    from neurojax.config import Serving, Span
    from neurojax.files.load import load_span
    from neurojax.files.put import stored
    from neurojax.folders import cache_dir
    from neurojax.measure.quality.logits import check_tokens, logits, read_tokens
    from neurojax.stage.compilation_cache import use_compilation_cache
    from neurojax.stage.compile import CompiledStage

    tokens = read_tokens(self.tokens)
    if self.decode_from is not None and not 0 <= self.decode_from <= len(tokens):
      raise ValueError(f"--decode-from {self.decode_from}: there are {len(tokens)} tokens")
    asked = Serving(dtype=self.dtype, weights=self.weights, sequences=1, programs=self.programs)
    with self.open() as file:
      config = file.config
      check_tokens(tokens, config.vocab_size, where=str(self.tokens))
      if not 1 <= self.stages <= config.num_layers:
        raise ValueError(f"--stages {self.stages}: the model has {config.num_layers} layers")
      if len(tokens) > config.context_length:
        stderr.print(
          f"{len(tokens)} tokens: the model was made for {config.context_length} positions"
        )
      serving = resolve(file, asked)
      use_compilation_cache(cache_dir() / "xla")
      bounds = [config.num_layers * i // self.stages for i in range(self.stages + 1)]
      made = []
      with stderr.status("reading layers and compiling"):
        for first, after in itertools.pairwise(bounds):
          span = Span(first_layer=first, last_layer=after - 1, num_layers=config.num_layers)
          model = load_span(file, span, dtype=jnp.dtype(serving.dtype), weights=serving.weights)
          made.append(CompiledStage(model, context_length=len(tokens), programs=serving.programs))
      found = logits(made, tokens, decode_from=self.decode_from)
    # np.save would append .npy to a name that does not end so.
    with stored(self.out) as out:
      np.save(out, found)
    print(f"{self.out}: {len(tokens)} rows of {config.vocab_size} logits")
    return 0


def check_new(flag: str, path: Path, *, overwrite: bool) -> None:
  """Refuse, before any work, a file that cannot be written or exists.

  Raises: ValueError: says which, and what to do.
  """
  check_out(flag, path)
  if path.exists() and not overwrite:
    raise ValueError(f"{flag} {path} exists: name another file, or give --overwrite")

"""The verbs `neurojax data prepare` and `neurojax data check`."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from neurojax.cli.console import progress

VocabularyKind = Literal["bpe", "spm", "unigram"]

if TYPE_CHECKING:
  from neurojax.data.token_shards import Meta
  from neurojax.tokenizer.tokenizer_spec import TokenizerSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
  """Turn text into token shards for `neurojax train`.

  Reads UTF-8 text and JSONL, plain or compressed by gzip or xz (the content decides, not the name).
  Rows that are not UTF-8, not JSON or have no text are left out, counted and named. A vocabulary is
  learnt from the training documents, unless --tokenizer gives one. The folder appears when it is
  complete.

  Example: neurojax data prepare books.txt.xz --document-separator '<|endofbook|>' --out data/books
  Example: neurojax data prepare stories.jsonl --vocab spm --vocab-size 4096 --out data/stories
  """

  inputs: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE ...")]
  """Files to read; - is standard input."""
  out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
  """The folder to make."""
  valid: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = ()
  """Files of held-out documents; without them --valid-fraction decides."""
  valid_fraction: float = 0.01
  """The share of documents to hold out, from 0 (none) to below 1."""
  document_separator: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
  """The text that stands between two documents of a file; without it a text file is one document."""
  tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE|DIR")] = None
  """A vocabulary to take, not learn: a model file, tokenizer.json, tokenizer.model or prepared data."""
  eos: Annotated[str | None, tyro.conf.arg(metavar="TOKEN")] = None
  """The token that ends a document, for a tokenizer.json or tokenizer.model that does not say."""
  vocab: VocabularyKind = "bpe"
  """The kind of vocabulary to learn: bpe merges bytes, as GPT-2's; spm is SentencePiece's BPE, as Llama 2's; unigram is SentencePiece's unigram model, which a GGUF file cannot hold."""
  vocab_size: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 8192
  """Tokens of the vocabulary to learn."""
  pre_tokenizer: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
  """How bpe cuts text before it merges, by llama.cpp's name: gpt-2, smollm, llama-bpe, ... Without it, qwen2."""
  learn_bytes: Annotated[int, tyro.conf.arg(metavar="BYTES")] = 100_000_000
  """Learn the vocabulary from this much text, from the first document on."""
  format: Literal["auto", "text", "jsonl"] = "auto"
  """The format of the input; auto goes by the name, and takes standard input for text."""
  text_field: Annotated[str, tyro.conf.arg(metavar="NAME")] = "text"
  """The field of a JSONL object that holds its text."""
  join: bool = False
  """Read the files as parts of one, in this order, cut anywhere (as `split` cuts)."""
  seed: int = 0
  """Chooses the documents to hold out."""
  overwrite: bool = False
  """Replace prepared data in DIR."""
  json: bool = False
  """Print meta.json instead of a summary."""

  def run(self) -> int:
    from neurojax.data.prepare import (
      Preparation,
      command_line,
      partial_folder,
      prepare,
      remarks,
      spool,
    )

    if self.inputs.count("-") > 1:
      raise ValueError("- is named twice: standard input can be read once")
    spec = self._given()
    with partial_folder(self.out, overwrite=self.overwrite) as folder:
      piped = folder / "stdin"
      inputs = tuple(piped if name == "-" else Path(name) for name in self.inputs)
      if piped in inputs:
        if sys.stdin is None:
          raise ValueError("standard input is closed: name a file")
        spool(sys.stdin.buffer, piped)
      plan = Preparation(
        inputs=inputs,
        valid_inputs=self.valid,
        valid_fraction=self.valid_fraction,
        tokenizer=spec,
        vocabulary=self.vocab,
        vocab_size=self.vocab_size,
        pre=self.pre_tokenizer or "qwen2",
        learn_bytes=self.learn_bytes,
        format=self.format,
        separator=self.document_separator,
        text_field=self.text_field,
        joined=self.join,
        seed=self.seed,
        names={piped: "standard input"},
        made_with=command_line(),
      )
      with progress() as bars:
        bar = bars.add_task("", total=None)
        meta = prepare(
          plan,
          folder,
          progress=lambda what, done: bars.update(bar, description=f"{what}, {done / 1e6:.0f} MB"),
        )
      piped.unlink(missing_ok=True)
    for remark in remarks(plan, meta):
      print(f"neurojax: warning: {remark}", file=sys.stderr)
    if self.json:
      print((self.out / "meta.json").read_text(encoding="utf-8"), end="")
    else:
      _print(self.out, meta)
    return 0

  def _given(self) -> "TokenizerSpec | None":
    """Returns the vocabulary that --tokenizer names. Raises: ValueError: options contradict it."""
    if self.pre_tokenizer is not None and self.vocab != "bpe":
      raise ValueError(f"--pre-tokenizer goes with --vocab bpe: {self.vocab} has rules of its own")
    if self.tokenizer is None:
      if self.eos is not None:
        raise ValueError("--eos goes with --tokenizer: a learnt vocabulary has its own end of text")
      return None
    from neurojax.data.vocabulary import read_vocabulary

    return read_vocabulary(self.tokenizer, eos=self.eos)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
  """Compare every file of prepared data with the digests taken when it was made.

  Example: neurojax data check data/books
  """

  folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR")]
  """A folder that `neurojax data prepare` made."""

  def run(self) -> int:
    from neurojax.data.token_shards import check_digests, read_meta

    check_digests(self.folder)
    _print(self.folder, read_meta(self.folder))
    return 0


def _print(folder: Path, meta: "Meta") -> None:
  print(f"{folder}: vocabulary of {meta.vocab_size:,}, {meta.dtype}")
  for name, split, text in (
    ("train", meta.train, meta.train_text_bytes),
    ("valid", meta.valid, meta.valid_text_bytes),
  ):
    ratio = f", {text / split.tokens:.2f} bytes a token" if split.tokens else ""
    print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens{ratio}")
  bad = sum(source.bad_rows for source in meta.sources)
  rows = sum(source.rows for source in meta.sources)
  if bad:
    print(f"{bad:,} of {rows:,} rows were bad and left out:")
    for row in meta.bad_rows[:10]:
      print(f"  {row}")
    if bad > 10:
      print(f"  and {bad - 10:,} more" + (" (the first 100: meta.json)" if bad > 100 else ""))
  if meta.forced_cuts:
    print(f"{meta.forced_cuts} times a text without spaces was cut, perhaps within a token")

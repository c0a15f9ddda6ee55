"""Turns text files into a folder of token shards, whole or not at all."""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from neurojax.data.corpus import ARCHIVES, Corpus, Format, Part, Tally, check_is_text
from neurojax.data.token_shards import (
  FORMAT,
  META,
  SHARD_TOKENS,
  SPEC,
  TOKENIZER_JSON,
  TOKENIZER_MODEL,
  Meta,
  ShardWriter,
  Source,
  dtype_for,
  write_synced,
)
from neurojax.tokenizer.spec_json import dump_spec
from neurojax.tokenizer.tokenizer import Tokenizer
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from neurojax.tokenizer.vocabulary_training import train_bpe, train_sentencepiece
from neurojax.tokenizer.write.tokenizer_json import json_from_spec
from neurojax.tokenizer.write.tokenizer_model import sentencepiece_from_spec

# Characters encoded in one call: enough for all cores, and little memory.
_BATCH = 1 << 21
_MARK = ".neurojax-partial"

VocabularyKind = Literal["bpe", "spm", "unigram"]

Progress = Callable[[str, int], None]
"""A function of the work in progress, in words, and the characters done so far."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
  """The files to prepare, and how.

  Attributes:
    inputs: Files of text or JSONL, plain, .gz or .xz.
    valid_inputs: Held-out files. If there are any, all of `inputs` is for training.
    valid_fraction: The share of documents to hold out, chosen by their number and the seed.
    tokenizer: A given vocabulary, which must have an end of text; None learns one.
    vocabulary: Without `tokenizer`, a vocabulary of this kind is learnt from the training documents:
      "bpe" merges bytes, "spm" is SentencePiece's BPE, "unigram" its unigram model.
    vocab_size: Tokens of the vocabulary to learn.
    pre: The pre-tokenizer of a "bpe" vocabulary to learn.
    learn_bytes: UTF-8 bytes of training documents to learn a vocabulary from, from the first on.
    format, separator, text_field, joined: The arguments of `corpus.Corpus`.
    seed: Chooses the documents to hold out.
    shard_tokens: Tokens of a full shard.
    names: Names of files in reports, instead of their paths.
    made_with: The command line or program to name in meta.json.
  """

  inputs: tuple[Path, ...]
  valid_inputs: tuple[Path, ...] = ()
  valid_fraction: float = 0.01
  tokenizer: TokenizerSpec | None = None
  vocabulary: VocabularyKind = "bpe"
  vocab_size: int = 8192
  pre: str = "qwen2"
  learn_bytes: int = 100_000_000
  format: Format = "auto"
  separator: str | None = None
  text_field: str = "text"
  joined: bool = False
  seed: int = 0
  shard_tokens: int = SHARD_TOKENS
  names: dict[Path, str] = dataclasses.field(default_factory=dict)
  made_with: str = ""

  def __post_init__(self) -> None:
    if not 0 <= self.valid_fraction < 1:
      raise ValueError(f"valid_fraction = {self.valid_fraction}: at least 0 and below 1")
    if self.learn_bytes < 1 or self.shard_tokens < 1:
      raise ValueError(
        f"learn_bytes = {self.learn_bytes}, shard_tokens = {self.shard_tokens}: at least 1"
      )
    if both := set(self.inputs) & set(self.valid_inputs):
      raise ValueError(f"{min(both)} is both for training and held out")
    if self.tokenizer is not None and self.tokenizer.eos_id is None:
      raise ValueError(
        "the tokenizer names no end of text (eos), which ends a document: take another"
      )

  def held_out(self, document: int) -> bool:
    """Tells whether this document of `inputs` is held out."""
    if self.valid_inputs or not self.valid_fraction:
      return False
    digest = hashlib.blake2b(f"{self.seed}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < self.valid_fraction * 2**64

  def corpus(self, paths: Sequence[Path], *, cut: bool) -> Corpus:
    return Corpus(
      paths,
      format=self.format,
      separator=self.separator,
      text_field=self.text_field,
      joined=self.joined,
      cut=cut,
      names=self.names,
    )


@contextlib.contextmanager
def partial_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
  """Gives a folder to fill, which becomes `out` at the end of the block, unless the block fails.

  Raises: ValueError: `out` exists (and `overwrite` is off, or it is no prepared data), or another
    process is preparing it.
  """
  if out.exists() and not overwrite:
    raise ValueError(f"{out} exists: choose another folder, or give --overwrite")
  if out.exists() and not (out / META).is_file() and (not out.is_dir() or any(out.iterdir())):
    raise ValueError(f"{out} is not prepared data: it is not overwritten; choose another folder")
  partial = out.with_name(f"{out.name}.partial")
  if partial.exists() and not (partial / _MARK).exists():
    raise ValueError(f"{partial} is in the way, and not of this program's making: move it")
  partial.mkdir(parents=True, exist_ok=True)
  with (partial / _MARK).open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise ValueError(f"{out} is being prepared by another process: wait for it") from error
    try:
      # A killed run left these.
      for old in partial.iterdir():
        if old.name != _MARK:
          old.unlink()
      yield partial
      if out.exists():
        # The file that makes it look finished goes first.
        (out / META).unlink(missing_ok=True)
        shutil.rmtree(out)
      partial.rename(out)
      (out / _MARK).unlink()
    except BaseException:
      shutil.rmtree(partial, ignore_errors=True)
      raise


def prepare(
  plan: Preparation, folder: Path, *, progress: Progress = lambda what, done: None
) -> Meta:
  """Fills a folder (see `partial_folder`) with shards, tokenizer and meta.json.

  Memory is bounded by the batch that is encoded, by the longest document if the tokenizer cannot encode
  it in parts, and, while a vocabulary is learnt, by the distinct words ("bpe") or by `learn_bytes`.

  Raises: ValueError: the input cannot be read, or a split has no document.
  """
  spec = plan.tokenizer
  if spec is None:
    corpus = plan.corpus(plan.inputs, cut=True)
    texts = _learned(plan, corpus, progress)
    first = next(texts, None)
    if first is None:
      raise ValueError(_nothing("training", corpus.tallies, corpus.bad))
    spec = _learn(plan, itertools.chain([first], texts))
  assert spec.eos_id is not None
  tokenizer = Tokenizer(spec)
  dtype = dtype_for(len(spec.tokens))
  train, valid = (
    ShardWriter(folder, split, dtype, plan.shard_tokens) for split in ("train", "valid")
  )
  cut = tokenizer.cuts_at_spaces
  corpora = [plan.corpus(plan.inputs, cut=cut)]
  _encode(tokenizer, corpora[0].parts(), lambda i: valid if plan.held_out(i) else train, progress)
  if plan.valid_inputs:
    corpora.append(plan.corpus(plan.valid_inputs, cut=cut))
    _encode(tokenizer, corpora[1].parts(), lambda i: valid, progress)
  tallies = [tally for corpus in corpora for tally in corpus.tallies]
  bad = [row for corpus in corpora for row in corpus.bad]
  if not train.documents:
    raise ValueError(_nothing("training", tallies, bad))
  if not valid.documents and (plan.valid_inputs or plan.valid_fraction):
    raise ValueError(_nothing("held-out", tallies, bad))
  text = dump_spec(spec)
  write_synced(folder / SPEC, text.encode())
  with contextlib.suppress(NotImplementedError):
    if spec.kind in ("spm", "sentencepiece"):
      write_synced(folder / TOKENIZER_MODEL, sentencepiece_from_spec(spec))
    else:
      write_synced(folder / TOKENIZER_JSON, json_from_spec(spec).encode())
  meta = Meta(
    format=FORMAT,
    dtype=dtype,
    vocab_size=len(spec.tokens),
    eos_id=spec.eos_id,
    tokenizer_sha256=hashlib.sha256(text.encode()).hexdigest(),
    train=train.finish(),
    valid=valid.finish(),
    train_text_bytes=train.text_bytes,
    valid_text_bytes=valid.text_bytes,
    sources=tuple(Source(**dataclasses.asdict(tally)) for tally in tallies),
    bad_rows=tuple(bad),
    forced_cuts=sum(corpus.forced_cuts for corpus in corpora),
    separator=plan.separator,
    made_with=plan.made_with,
  )
  table = {key: value for key, value in dataclasses.asdict(meta).items() if value is not None}
  write_synced(folder / META, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())
  return meta


def remarks(plan: Preparation, meta: Meta) -> list[str]:
  """Returns what a user should know before training, in one line each."""
  found = []
  bad = sum(source.bad_rows for source in meta.sources)
  rows = sum(source.rows for source in meta.sources)
  if 2 * bad > rows:
    first = "; ".join(meta.bad_rows[:3])
    found.append(
      f"{bad:,} of {rows:,} rows ({bad / rows:.1%}) were bad and left out, first {first}"
    )
  if plan.tokenizer is None and meta.vocab_size < plan.vocab_size:
    found.append(
      f"the vocabulary has {meta.vocab_size:,} tokens where {plan.vocab_size:,} were asked for: the"
      " text that it was learnt from gives no more"
    )
  if plan.tokenizer is None and plan.vocabulary == "unigram":
    found.append(
      "a GGUF file cannot hold a unigram vocabulary: export the trained model as a folder"
    )
  return found


def _learn(plan: Preparation, texts: Iterator[str]) -> TokenizerSpec:
  if plan.vocabulary == "bpe":
    return train_bpe(texts, vocab_size=plan.vocab_size, pre=plan.pre)
  model = "bpe" if plan.vocabulary == "spm" else "unigram"
  return train_sentencepiece(texts, vocab_size=plan.vocab_size, model=model)


def spool(stream: BinaryIO, path: Path) -> None:
  """Copies a pipe, which can be read once, to a file, which is read twice.

  Raises: ValueError: the pipe is empty, or begins with NULs: /dev/zero would fill the disk.
  """
  name = "standard input"
  with path.open("wb") as file:
    head = stream.read(1 << 16)
    if not head:
      raise ValueError(f"{name} is empty: pipe the text into it")
    # Short archives are full of NULs too.
    if not head.startswith(ARCHIVES):
      check_is_text(head, name)
    file.write(head)
    shutil.copyfileobj(stream, file, 1 << 20)


def _learned(plan: Preparation, corpus: Corpus, progress: Progress) -> Iterator[str]:
  """Yields training text, up to `learn_bytes` of it."""
  document, done = 0, 0
  for part in corpus.parts():
    if not plan.held_out(document) and part.text:
      yield part.text
      done += len(part.text.encode())
      progress("reading text to learn a vocabulary", done)
      if done >= plan.learn_bytes:
        break
    document += part.ends
  progress("learning a vocabulary", done)


def _encode(
  tokenizer: Tokenizer,
  parts: Iterator[Part],
  place: Callable[[int], ShardWriter],
  progress: Progress,
) -> None:
  """Encodes documents and writes each to its split, with an end of text."""
  end, document, done = tokenizer.eos_id, 0, 0
  # Reading and decompressing go on while the library encodes on its own threads.
  with ThreadPoolExecutor(1) as pool:
    waiting: list[tuple[list[Part], Future[list[list[int]]]]] = []
    batches = _batches(parts)
    while True:
      batch = next(batches, None)
      if batch is not None:
        waiting.append((batch, pool.submit(tokenizer.encode_many, [part.text for part in batch])))
      if not waiting:
        break
      if batch is None or len(waiting) > 2:
        ready, future = waiting.pop(0)
        for part, ids in zip(ready, future.result(), strict=True):
          writer = place(document)
          writer.write(np.asarray([*ids, end] if part.ends else ids))
          writer.text_bytes += len(part.text.encode())
          writer.documents += part.ends
          document += part.ends
          done += len(part.text)
        progress("encoding", done)


def _batches(parts: Iterator[Part]) -> Iterator[list[Part]]:
  batch, size = [], 0
  for part in parts:
    batch.append(part)
    size += len(part.text) + 64
    if size >= _BATCH:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _nothing(what: str, tallies: Sequence[Tally], bad: Sequence[str]) -> str:
  documents, rows = sum(t.documents for t in tallies), sum(t.bad_rows for t in tallies)
  reason = f"no {what} document: {documents} documents and {rows} bad rows in all"
  if bad:
    return f"{reason}, the first {bad[0]}"
  if documents:
    return (
      f"{reason}: name a file with --valid, change --valid-fraction (0 for none), or say what"
      " separates documents with --document-separator"
    )
  return f"{reason}: the input holds no text"


def command_line() -> str:
  import shlex

  return "neurojax " + shlex.join(sys.argv[1:])

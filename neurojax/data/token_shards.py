"""The folder format of prepared tokens, which is checked when it is opened.

    meta.json            the contents of the folder, with digests (`Meta`)
    tokenizer.spec.json  the vocabulary and its rules, as `tokenizer.spec_json` writes them
    tokenizer.json       the same for other programs, if it is byte-level BPE
    tokenizer.model      the same for other programs, if it is SentencePiece's
    train-00000.bin ...  token ids, little-endian, of `Meta.dtype`, without any header
    valid-00000.bin ...  the held-out documents

Documents follow one another, each ended by `Meta.eos_id`. meta.json is written last.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from neurojax.config import from_dict
from neurojax.files.digest import sha256_of
from neurojax.files.put import stored
from neurojax.tokenizer.spec_json import parse_spec
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

FORMAT = "neurojax.tokens/1"
META, SPEC = "meta.json", "tokenizer.spec.json"
TOKENIZER_JSON, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.model"
SHARD_TOKENS = 1 << 28

SplitName = Literal["train", "valid"]
Dtype = Literal["uint16", "uint32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
  file: str
  tokens: int
  sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
  """The shards of one split; `tokens` counts the ends of documents too."""

  tokens: int
  documents: int
  shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """The counts of one input file; `bytes` and `sha256` are those of the file as it lies on disk."""

  file: str
  bytes: int
  sha256: str
  documents: int
  rows: int
  bad_rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meta:
  """The contents of meta.json.

  Attributes:
    vocab_size: The number of token ids.
    eos_id: The id that ends every document.
    train_text_bytes, valid_text_bytes: UTF-8 bytes of all documents of a split.
    bad_rows: The first rows that were left out, with file and line.
    forced_cuts: Places where a text without spaces was cut, perhaps through a token.
    made_with: The command line or program that wrote the folder.
  """

  format: str
  dtype: Dtype
  vocab_size: int
  eos_id: int
  tokenizer_sha256: str
  train: Split
  valid: Split
  train_text_bytes: int
  valid_text_bytes: int
  sources: tuple[Source, ...]
  bad_rows: tuple[str, ...]
  forced_cuts: int
  separator: str | None = None
  made_with: str = ""

  def split(self, name: SplitName) -> Split:
    return self.train if name == "train" else self.valid

  def identity(self) -> str:
    """Returns a digest of all that a training run depends on: tokens, splits and vocabulary."""
    parts = [self.dtype, str(self.vocab_size), str(self.eos_id), self.tokenizer_sha256]
    for split in (self.train, self.valid):
      parts += [f"{shard.tokens}:{shard.sha256}" for shard in split.shards] + ["|"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def dtype_for(vocab_size: int) -> Dtype:
  return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_meta(folder: str | Path) -> Meta:
  """Reads meta.json. Raises: FileNotFoundError or ValueError: it is absent or damaged."""
  path = Path(folder) / META
  if not path.is_file():
    raise FileNotFoundError(
      f"{path}: no such file: {folder} holds no prepared data; make it with `neurojax data prepare`"
    )
  try:
    table = json.loads(path.read_bytes().decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: damaged: {error}: prepare the data again") from error
  if not isinstance(table, dict) or table.get("format") != FORMAT:
    raise ValueError(f"{path}: this is not of format {FORMAT!r}: prepare the data again")
  meta = from_dict(Meta, table, where=str(path))
  if meta.dtype != dtype_for(meta.vocab_size) or not 0 <= meta.eos_id < meta.vocab_size:
    raise ValueError(f"{path}: dtype, vocab_size and eos_id contradict one another: prepare again")
  for name in ("train", "valid"):
    split = meta.split(name)
    if sum(shard.tokens for shard in split.shards) != split.tokens:
      raise ValueError(f"{path}: {name}.tokens = {split.tokens} is not what its shards add up to")
    for shard in split.shards:
      if Path(shard.file).name != shard.file:
        raise ValueError(f"{path}: shard {shard.file!r} is no file of this folder")
  return meta


def read_spec(folder: str | Path) -> TokenizerSpec:
  """Reads the tokenizer of prepared data.

  Raises: FileNotFoundError or ValueError: it is absent or damaged.
  """
  path = Path(folder) / SPEC
  meta = read_meta(folder)
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file: prepare the data again")
  if sha256_of(path) != meta.tokenizer_sha256:
    raise ValueError(f"{path}: its digest is not the one in {META}: prepare the data again")
  return parse_spec(path.read_text(encoding="utf-8"), where=str(path))


def check_digests(folder: str | Path) -> None:
  """Compares every shard with its digest. Raises: ValueError: it names all damaged ones."""
  folder, meta = Path(folder), read_meta(folder)
  read_spec(folder)
  damaged = [
    shard.file
    for shard in (*meta.train.shards, *meta.valid.shards)
    if not (folder / shard.file).is_file() or sha256_of(folder / shard.file) != shard.sha256
  ]
  if damaged:
    raise ValueError(
      f"{folder}: {', '.join(damaged)}: missing or not the bytes whose digest is in {META}:"
      " prepare the data again"
    )


class Tokens:
  """The tokens of one split, memory-mapped, as one array over all its shards.

  Raises: ValueError: the split is empty, or a shard is missing or has another size than in meta.json.
  """

  def __init__(self, folder: str | Path, split: SplitName):
    folder = Path(folder)
    self.meta = read_meta(folder)
    parts = self.meta.split(split).shards
    if not parts:
      raise ValueError(f"{folder}: its {split} split is empty: prepare it with one")
    dtype = np.dtype(self.meta.dtype).newbyteorder("<")
    for shard in parts:
      path = folder / shard.file
      if not path.is_file():
        raise ValueError(f"{path}: missing, though {META} names it: prepare the data again")
      if path.stat().st_size != shard.tokens * dtype.itemsize:
        raise ValueError(
          f"{path}: {path.stat().st_size} bytes, where {META} says {shard.tokens} tokens of"
          f" {dtype.itemsize}: damaged or cut short; prepare the data again"
        )
    self._shards = [np.memmap(folder / shard.file, dtype=dtype, mode="r") for shard in parts]
    self._starts = list(itertools.accumulate((shard.tokens for shard in parts), initial=0))

  def __len__(self) -> int:
    return self._starts[-1]

  def read(self, start: int, length: int) -> np.ndarray:
    """Returns the tokens from `start` on, across shards, as int32 [length]."""
    if not 0 <= start <= start + length <= len(self):
      raise ValueError(f"tokens {start} to {start + length} are not within 0..{len(self)}")
    out = np.empty(length, np.int32)
    at, done = bisect.bisect_right(self._starts, start) - 1, 0
    while done < length:
      offset = start + done - self._starts[at]
      piece = self._shards[at][offset : offset + length - done]
      out[done : done + len(piece)] = piece
      done, at = done + len(piece), at + 1
    return out


class ShardWriter:
  """Writes one split as shards of at most `shard_tokens` tokens."""

  def __init__(self, folder: Path, split: str, dtype: Dtype, shard_tokens: int = SHARD_TOKENS):
    self._folder, self._split, self._limit = folder, split, shard_tokens
    self._dtype = np.dtype(dtype).newbyteorder("<")
    self._file: BinaryIO | None = None
    self._digest, self._count = hashlib.sha256(), 0
    self._shards: list[Shard] = []
    self.documents = 0
    self.text_bytes = 0

  def write(self, ids: Sequence[int] | np.ndarray) -> None:
    ids_T = np.asarray(ids, np.int64).astype(self._dtype)
    while len(ids_T):
      if self._file is None:
        self._file = (self._folder / self._name()).open("wb")
      data = ids_T[: self._limit - self._count].tobytes()
      ids_T = ids_T[self._limit - self._count :]
      self._file.write(data)
      self._digest.update(data)
      self._count += len(data) // self._dtype.itemsize
      if self._count == self._limit:
        self._end()

  def _name(self) -> str:
    return f"{self._split}-{len(self._shards):05d}.bin"

  def _end(self) -> None:
    if self._file is None:
      return
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
    self._shards.append(
      Shard(file=self._name(), tokens=self._count, sha256=self._digest.hexdigest())
    )
    self._file, self._digest, self._count = None, hashlib.sha256(), 0

  def finish(self) -> Split:
    self._end()
    tokens = sum(shard.tokens for shard in self._shards)
    return Split(tokens=tokens, documents=self.documents, shards=tuple(self._shards))


def write_synced(path: Path, data: bytes) -> None:
  with stored(path) as file:
    file.write(data)

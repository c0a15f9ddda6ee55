"""Reads documents out of files of text or JSONL, plain or compressed, in bounded memory."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

Format = Literal["auto", "text", "jsonl"]

_BLOCK = 1 << 20
# A line longer than this is taken in parts (text) or refused as a row (JSONL).
_LONGEST_LINE = 1 << 26
# A document is handed on in parts of about _PART characters, cut where that changes no token. After
# _LONGEST_PART characters without such a place it is cut anyway, and the cut is counted.
_PART, _LONGEST_PART = 1 << 14, 1 << 23
# A document that may not be cut is held in memory whole, and its tokens beside it.
_LONGEST_DOCUMENT = 1 << 26
_NAMED = 100
_JSONL = (".jsonl", ".ndjson", ".jsonlines")
_XZ, _GZIP = ARCHIVES = (b"\xfd7zXZ\x00", b"\x1f\x8b")
"""The first bytes of the archives that can be read."""
_FOREIGN: tuple[tuple[bytes, str], ...] = (
  (b"\x28\xb5\x2f\xfd", "a zstd archive: decompress it into a pipe (zstdcat FILE | ... -)"),
  (b"BZh", "a bzip2 archive: decompress it into a pipe (bzcat FILE | ... -)"),
  (b"PK\x03\x04", "a zip archive: extract it first"),
  (b"PAR1", "a Parquet file: convert it to JSONL first"),
  (b"%PDF", "a PDF, not text: extract its text first"),
  (b"\xff\xfe", "UTF-16: convert it (iconv -t UTF-8 FILE | ... -)"),
  (b"\xfe\xff", "UTF-16: convert it (iconv -t UTF-8 FILE | ... -)"),
)
# A larger share of NULs in its first bytes makes a file no text. A few are characters like any other.
_NUL_SHARE = 0.1


@dataclasses.dataclass(kw_only=True)
class Tally:
  """The counts of one file. Rows are lines of text, or the lines of JSONL that are not blank."""

  file: str
  bytes: int = 0
  sha256: str = ""
  rows: int = 0
  bad_rows: int = 0
  documents: int = 0


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a document's text; `ends` marks the document's last part."""

  text: str
  ends: bool


class Corpus:
  """The documents of some files, which can be read more than once.

  Bad rows (not UTF-8, not JSON, no text) are left out and counted, and the first 100 are named.

  Attributes:
    tallies: The counts of each file at the last reading.
    bad: "FILE, line N: reason" for each of the first bad rows.
    forced_cuts: Parts that ended where a token may have spanned the cut.
  """

  def __init__(
    self,
    paths: Sequence[Path],
    *,
    format: Format = "auto",
    separator: str | None = None,
    text_field: str = "text",
    joined: bool = False,
    cut: bool = True,
    names: dict[Path, str] | None = None,
  ):
    """
    Args:
      separator: The text between two documents of a text file. It and the line ends around it are left
        out. Without one a file is one document.
      text_field: The field of a JSONL object that holds its text.
      joined: Whether the files are parts of one, in this order, as `split` makes them.
      cut: Whether documents may be handed on in parts; see `Tokenizer.cuts_at_spaces`.
      names: Names of files in reports, instead of their paths.
    Raises: ValueError: no file is given, one is given twice, does not exist or is no regular file.
    """
    if not paths:
      raise ValueError("no input: name at least one file")
    if separator == "":
      raise ValueError("the separator is empty: leave it away, or give the text between documents")
    if len(set(paths)) < len(paths):
      raise ValueError(f"{next(p for p in paths if paths.count(p) > 1)} is named twice")
    for path in paths:
      if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
      if not path.is_file():
        raise ValueError(f"{path}: this is no regular file: name files of text, or - for a pipe")
    self._paths = list(paths)
    self._names = [(names or {}).get(path, str(path)) for path in paths]
    self._separator, self._field, self._joined, self._cut = separator, text_field, joined, cut
    kinds = [_format(path, format) for path in paths]
    if joined and len(set(kinds)) > 1:
      raise ValueError("parts of one file are all text or all JSONL: give --format")
    self._kinds = kinds
    self._reset()

  def _reset(self) -> None:
    self.tallies = [Tally(file=name) for name in self._names]
    self.bad: list[str] = []
    self.forced_cuts = 0

  def parts(self) -> Iterator[Part]:
    """Yields every document's text in parts.

    Raises: ValueError: an archive is damaged, a file is no text, or a document that may not be cut is
      too long to be held in memory.
    """
    self._reset()
    groups = [range(len(self._paths))] if self._joined else [[i] for i in range(len(self._paths))]
    for group in groups:
      documents = _Documents(self, group[0], self._separator)
      if self._kinds[group[0]] == "jsonl":
        for source, line, row in self._lines(group):
          yield from self._row(source, line, row)
        continue
      for source, text in self._texts(group):
        documents.source = source
        yield from documents.push(text)
      yield from documents.finish()

  def _row(self, source: int, line: int, row: bytes) -> Iterator[Part]:
    if not row.strip():
      return
    self.tallies[source].rows += 1
    text = _text_of(row, self._field)
    if isinstance(text, _Bad):
      self._refuse(source, line, text.reason)
    elif text:
      documents = _Documents(self, source, separator=None)
      yield from documents.push(text)
      yield from documents.finish()

  def _refuse(self, source: int, line: int, reason: str) -> None:
    self.tallies[source].bad_rows += 1
    if len(self.bad) < _NAMED:
      self.bad.append(f"{self._names[source]}, line {line}: {reason}")

  def _texts(self, group: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yields the good lines of text, many at a time."""
    for source, line, block in self._blocks(group):
      rows = block.count(b"\n") + (not block.endswith(b"\n"))
      self.tallies[source].rows += rows
      try:
        yield source, block.decode("utf-8")
        continue
      except UnicodeDecodeError:
        pass
      for i, row in enumerate(block.split(b"\n")):
        end = b"\n" if i < block.count(b"\n") else b""
        try:
          yield source, (row + end).decode("utf-8")
        except UnicodeDecodeError as error:
          self._refuse(source, line + i, f"not UTF-8 at byte {error.start} of the line")

  def _lines(self, group: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
    """Yields lines; of a line that is too long its first part alone."""
    refused = None
    for source, line, block in self._blocks(group):
      for i, row in enumerate(block.split(b"\n")):
        if (source, line + i) == refused:
          continue
        if len(row) > _LONGEST_LINE:
          refused = source, line + i
        yield source, line + i, row

  def _blocks(self, group: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
    """Yields blocks of whole lines: the number of their file, of their first line, and the bytes."""
    held, whose, line = b"", group[0], 1
    for source in group:
      first = True
      for block in self._read(source):
        if first and source == group[0]:
          block = block.removeprefix(b"\xef\xbb\xbf")
        if first and held and source != whose:
          # The line that the cut between two parts went through belongs to the file it began in.
          end = block.find(b"\n") + 1
          if not end:
            held += block
            continue
          yield whose, line, held + block[:end]
          held, whose, line, block = b"", source, 2, block[end:]
        elif first:
          whose, line = source, 1
        first = False
        end = block.rfind(b"\n") + 1
        if end:
          whole = held + block[:end]
          held = block[end:]
          yield whose, line, whole
          line += whole.count(b"\n")
        else:
          held += block
          # The first part alone is too long for a row, wherever its last character ends.
          if len(held) > _LONGEST_LINE + 4:
            end = _boundary(held)
            yield whose, line, held[:end]
            held = held[end:]
    if held:
      yield whose, line, held

  def _read(self, source: int) -> Iterator[bytes]:
    tally, path = self.tallies[source], self._paths[source]
    digest = hashlib.sha256()
    with path.open("rb") as raw:
      watched = _Watched(raw, digest)
      buffered = io.BufferedReader(watched, _BLOCK)
      try:
        blocks = _blocks_of(_unpacked(buffered, path, self._names[source]))
        if first := next(blocks, b""):
          check_is_text(first, self._names[source])
          yield first
        yield from blocks
      except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
          f"{self._names[source]}: damaged archive after {watched.count} bytes ({error}): get it again"
        ) from error
      while buffered.read(_BLOCK):
        pass
    tally.bytes, tally.sha256 = watched.count, digest.hexdigest()


class _Documents:
  """Cuts text that arrives in pieces into documents and their parts."""

  def __init__(self, corpus: Corpus, source: int, separator: str | None):
    self._corpus, self._separator = corpus, separator
    self._held, self._begun = "", False
    self.source = source

  def push(self, text: str) -> Iterator[Part]:
    self._held += text
    if self._separator:
      *whole, self._held = self._held.split(self._separator)
      for document in whole:
        self._held, rest = document, self._held
        yield from self._end()
        self._held = rest
    if self._separator and not self._begun:
      self._held = self._held.lstrip("\r\n")
    if not self._corpus._cut and len(self._held) > _LONGEST_DOCUMENT:
      raise ValueError(
        f"{self._corpus._names[self.source]}: a document of more than {_LONGEST_DOCUMENT} characters,"
        " and this vocabulary encodes documents whole: say what separates documents with"
        " --document-separator, or take a byte-level vocabulary"
      )
    # A separator's beginning may be held at the end.
    yield from self._parts(_PART, len(self._separator or "") + 1)

  def _parts(self, least: int, spare: int) -> Iterator[Part]:
    """Yields parts of the held text, while more than `least` and `spare` characters are left."""
    if not self._corpus._cut:
      return
    start = 0
    while len(self._held) - start > least + spare:
      end = self._place(start, len(self._held) - spare)
      if end is None:
        break
      self._begun = True
      yield Part(self._held[start:end], False)
      start = end
    self._held = self._held[start:]

  def _place(self, start: int, limit: int) -> int | None:
    """Finds the end of a part from `start` on, at most `limit`; None where there is no place to cut."""
    held, at = self._held, start + _PART
    while (at := held.find(" ", at, limit)) >= 0:
      if held[at - 1].isalpha() and held[at + 1].isalpha():
        return at
      at += 1
    if limit - start < _LONGEST_PART:
      return None
    self._corpus.forced_cuts += 1
    return limit

  def finish(self) -> Iterator[Part]:
    yield from self._end()

  def _end(self) -> Iterator[Part]:
    if self._separator:
      self._held = self._held.rstrip("\r\n") if self._begun else self._held.strip("\r\n")
    if self._begun or self._held:
      self._corpus.tallies[self.source].documents += 1
      yield from self._parts(2 * _PART, 1)
      yield Part(self._held, True)
    self._held, self._begun = "", False


@dataclasses.dataclass(frozen=True)
class _Bad:
  reason: str


def _text_of(row: bytes, field: str) -> "str | _Bad":
  if len(row) > _LONGEST_LINE:
    return _Bad(f"longer than {_LONGEST_LINE} bytes")
  try:
    table = json.loads(row.decode("utf-8"))
  except UnicodeDecodeError as error:
    return _Bad(f"not UTF-8 at byte {error.start} of the line")
  except RecursionError:
    return _Bad("nested too deeply")
  except ValueError as error:
    return _Bad(f"not JSON: {error}")
  if not isinstance(table, dict):
    return _Bad(f"a JSON {type(table).__name__}, not an object")
  if field not in table:
    return _Bad(f"no field {field!r}")
  text = table[field]
  if not isinstance(text, str):
    return _Bad(f"field {field!r} is a {type(text).__name__}, not a string")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    return _Bad(f"field {field!r} holds a lone surrogate")
  return text


def _format(path: Path, format: Format) -> Literal["text", "jsonl"]:
  if format != "auto":
    return format
  name = path.name.removesuffix(".gz").removesuffix(".xz")
  return "jsonl" if name.endswith(_JSONL) else "text"


def _unpacked(file: io.BufferedReader, path: Path, name: str) -> BinaryIO:
  """Returns the decompressed content. Its first bytes decide, never the name alone."""
  head = file.peek(8)[:8]
  if head.startswith(_XZ):
    return lzma.open(file)
  if head.startswith(_GZIP):
    return gzip.open(file)
  for magic, what in _FOREIGN:
    if head.startswith(magic):
      raise ValueError(f"{name}: this is {what}")
  if path.suffix in (".xz", ".gz") and head:
    raise ValueError(f"{name}: its name says {path.suffix[1:]} and its first bytes do not")
  return file


def check_is_text(block: bytes, name: str) -> None:
  """Checks the first bytes of a file: they may decode as UTF-8 and yet be no text.

  Raises: ValueError: they are a tar archive, or full of NULs.
  """
  if block[257:262] == b"ustar":
    raise ValueError(f"{name}: this is a tar archive: extract it first (tar -xOf FILE | ... -)")
  head = block[:8000]
  if head.count(0) > _NUL_SHARE * len(head):
    raise ValueError(
      f"{name}: many of its bytes are NUL: this is no UTF-8 text, but UTF-16 (convert it: iconv -f"
      " UTF-16LE -t UTF-8 FILE | ... -) or no text at all"
    )


def _blocks_of(file: BinaryIO) -> Iterator[bytes]:
  with contextlib.ExitStack() as stack:
    if not isinstance(file, io.BufferedReader):
      stack.enter_context(file)
    while block := file.read(_BLOCK):
      yield block


def _boundary(held: bytes) -> int:
  """Returns the last place at which no character of UTF-8 is cut."""
  end = len(held) - 1
  while end > len(held) - 4 and held[end] & 0xC0 == 0x80:
    end -= 1
  return end


class _Watched(io.RawIOBase):
  """A file that counts and hashes the bytes that are read."""

  def __init__(self, raw: BinaryIO, digest: "hashlib._Hash"):
    self._raw, self._digest = raw, digest
    self.count = 0

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    size = self._raw.readinto(buffer)
    self._digest.update(memoryview(buffer)[:size])
    self.count += size
    return size

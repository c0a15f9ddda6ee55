"""llama2.c checkpoints (float32, "version 0") and their tokenizer files.

Format: https://github.com/karpathy/llama2.c, export.py `legacy_export` and run.c
`memory_map_weights`; tokenizer.py `Tokenizer.export`. Neither file has a magic number: a checkpoint
is known by a header that explains the size of the file to the byte.
"""

import contextlib
import dataclasses
import functools
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from neurojax.config import ModelConfig
from neurojax.files import digest, names
from neurojax.files.tensor_info import TensorInfo
from neurojax.tokenizer.read.bounded import read_bounded
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from neurojax.weights.rows import GroupedRows

_HEADER = struct.Struct("<7i")
_PIECE = struct.Struct("<fi")
_AGAIN = "download it again"
# Far above any real tokenizer; a length beyond it is damage.
_MAX_TOKENIZER_BYTES = 512 << 20
_MAX_PIECE_BYTES = 65_535


@dataclasses.dataclass(frozen=True)
class Header:
  """The seven numbers a checkpoint starts with; a negative `vocab_size` says: untied head."""

  dim: int
  hidden_dim: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  vocab_size: int
  seq_len: int

  @classmethod
  def parse(cls, head: bytes) -> Self | None:
    """The header in the first bytes of a file, or None when they cannot be one."""
    if len(head) < _HEADER.size:
      return None
    header = cls(*_HEADER.unpack_from(head))
    sizes = dataclasses.astuple(dataclasses.replace(header, vocab_size=abs(header.vocab_size)))
    if min(sizes) < 1 or header.dim % (2 * header.n_heads) or header.n_heads % header.n_kv_heads:
      return None
    return header

  @property
  def config(self) -> ModelConfig:
    """The architecture. run.c fixes the two constants that the header leaves out."""
    return ModelConfig(
      vocab_size=abs(self.vocab_size), model_dim=self.dim, num_layers=self.n_layers,
      num_heads=self.n_heads, num_kv_heads=self.n_kv_heads, head_dim=self.dim // self.n_heads,
      ffn_dim=self.hidden_dim, context_length=self.seq_len, rope_base=10_000.0,
      rope_style="interleaved", norm_eps=1e-5, tied_embedding=self.vocab_size > 0,
    )  # fmt: skip

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shapes of the blocks in file order. The freq_cis tables are counted, never read: they follow
    from seq_len and the head width, and run.c skips them as well."""
    config = self.config
    kv_dim = config.num_kv_heads * config.head_dim
    dim, hidden_dim, layers = self.dim, self.hidden_dim, self.n_layers
    shapes = {
      "token_embedding_table": (config.vocab_size, dim),
      "rms_att_weight": (layers, dim),
      "wq": (layers, dim, dim),
      "wk": (layers, kv_dim, dim),
      "wv": (layers, kv_dim, dim),
      "wo": (layers, dim, dim),
      "rms_ffn_weight": (layers, dim),
      "w1": (layers, hidden_dim, dim),
      "w2": (layers, dim, hidden_dim),
      "w3": (layers, hidden_dim, dim),
      "rms_final_weight": (dim,),
      "freq_cis_real": (self.seq_len, config.head_dim // 2),
      "freq_cis_imag": (self.seq_len, config.head_dim // 2),
    }
    if not config.tied_embedding:
      shapes["wcls"] = (config.vocab_size, dim)
    return shapes

  @property
  def file_bytes(self) -> int:
    return _HEADER.size + 4 * sum(math.prod(shape) for shape in self.shapes().values())


class Llama2cFile:
  """An open llama2.c checkpoint (a `ModelFile`).

  `tensors` lists the weights under run.c's names, each for all layers at once.

  Args:
    tokenizer: Its tokenizer file; without it `tokenizer` is None.
  Raises:
    ValueError: the size of the file is not what its header asks for.
  """

  format = "llama2c"
  version = 0

  def __init__(self, path: str | Path, tokenizer: str | Path | None = None) -> None:
    self.path = Path(path)
    self._tokenizer_path = None if tokenizer is None else Path(tokenizer)
    with contextlib.ExitStack() as undo:
      self._file = undo.enter_context(self.path.open("rb"))
      self._opened_as = os.fstat(self._file.fileno())
      self.file_bytes = size_bytes = self._opened_as.st_size
      header = Header.parse(self._file.read(_HEADER.size))
      if header is None:
        raise ValueError(f"{self.path}: this is no llama2.c checkpoint: its header makes no sense")
      if header.file_bytes != size_bytes:
        raise ValueError(
          f"{self.path}: {header} asks for {header.file_bytes} bytes and the file has "
          f"{size_bytes}: it is truncated or no llama2.c checkpoint: {_AGAIN}"
        )
      self._map: np.memmap | None = np.memmap(self._file, np.uint8, mode="r")
      undo.pop_all()
    self.metadata: Mapping[str, object] = dataclasses.asdict(header)
    self.tensors: Mapping[str, TensorInfo] = _tensors(header)
    stored = dict(names.LLAMA2C)
    if header.config.tied_embedding:
      del stored["head_DV"]
    self.interpretation = names.Interpretation(
      architecture="llama", config=header.config, tensors=stored
    )

  @property
  def config(self) -> ModelConfig:
    return self.interpretation.model_config(str(self.path))

  @functools.cached_property
  def _spec(self) -> TokenizerSpec | None:
    if self._tokenizer_path is None:
      return None
    return read_tokenizer(self._tokenizer_path, self.config.vocab_size)

  @property
  def tokenizer(self) -> TokenizerSpec | None:
    return self._spec

  @property
  def activations(self) -> None:
    return None

  @property
  def card(self) -> Mapping[str, str]:
    return {}

  def info(self, name: str, layer: int | None = None) -> TensorInfo:
    try:
      stored = names.locate(self.interpretation.tensors, name, layer, self.config)
    except ValueError as error:
      raise ValueError(f"{self.path}: {error}") from error
    info = self.tensors[stored.name]
    if layer is None:
      return info
    nbytes = info.nbytes // self.config.num_layers
    return TensorInfo(info.name, info.type, info.shape[1:], info.offset + layer * nbytes, nbytes)

  def read(self, name: str, layer: int | None = None) -> np.ndarray:
    # A copy: the map may be closed, and its pages are only read-only.
    values = self.stored_bytes(name, layer).view("<f4").astype(np.float32)
    return names.to_canonical(values, name, names.LLAMA2C[name].axes, self.config)

  def read_ternary(
    self, name: str, layer: int | None = None
  ) -> tuple[np.ndarray, np.ndarray, int | None]:
    kind = self.info(name, layer).type
    raise ValueError(f"{self.path}: {name} is {kind}, which is not ternary: read it as numbers")

  def narrow_form(self, name: str, layer: int | None = None) -> None:
    self.info(name, layer)

  def read_grouped(self, name: str, layer: int | None = None) -> GroupedRows:
    kind = self.info(name, layer).type
    raise ValueError(f"{self.path}: {name} is {kind}, no grouped integers: read it as numbers")

  def read_plain(self, name: str, layer: int | None = None) -> np.ndarray:
    return self.read(name, layer)

  def stored_bytes(self, name: str, layer: int | None = None) -> np.ndarray:
    info = self.info(name, layer)
    if self._map is None:
      raise ValueError(f"{self.path}: the file is closed")
    # Touching a mapped page behind the end of a shortened file kills the process (SIGBUS).
    if os.fstat(self._file.fileno()).st_size != self._map.size:
      raise ValueError(f"{self.path}: its size changed while it was open: open it again")
    return np.asarray(self._map[info.offset : info.offset + info.nbytes])

  def problems(self) -> list[str]:
    try:
      self.tokenizer  # noqa: B018
    except ValueError as error:
      return [str(error)]
    return []

  def check(self) -> None:
    self.tokenizer  # noqa: B018  the one thing that can be wrong after opening

  def check_unchanged(self) -> None:
    digest.check_unchanged(self.path, self._opened_as)

  def sha256(self) -> str:
    return digest.sha256_of(self.path, opened_as=self._opened_as)

  def close(self) -> None:
    """Views that `stored_bytes` gave out stay valid; the map goes with the last of them."""
    self._file.close()
    self._map = None

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()


def read_tokenizer(path: str | Path, vocab_size: int) -> TokenizerSpec:
  """Read a llama2.c tokenizer file, whose number of pieces only the checkpoint knows.

  The export wrote a space for U+2581 and decorated `<s>` and `</s>`; both are undone. Old exports
  wrote the byte pieces raw (`chr(n)`), newer ones as "<0xNN>"; both mean byte n at id 3 + n.
  run.c drops the space that begins the first piece behind BOS: `add_space_prefix` says so.

  Raises: ValueError: truncated, not UTF-8, or not `vocab_size` pieces.
  """
  path = Path(path)
  with path.open("rb") as file:
    raw = read_bounded(file, str(path), _MAX_TOKENIZER_BYTES, "a tokenizer's file")

  def fail(at: int, what: str) -> ValueError:
    return ValueError(f"{path}: byte {at}: {what}")

  if vocab_size < 259:
    raise ValueError(f"{path}: a vocabulary of {vocab_size}: 3 special and 256 byte pieces are due")
  if len(raw) < 4:
    raise fail(0, f"the tokenizer file ends within its header: {_AGAIN}")
  longest = int.from_bytes(raw[:4], "little", signed=True)
  if not 1 <= longest <= _MAX_PIECE_BYTES:
    raise fail(0, f"longest piece of {longest} bytes: this is no llama2.c tokenizer file")
  pieces, scores, at = [], [], 4
  for id_ in range(vocab_size):
    if at + _PIECE.size > len(raw):
      raise fail(at, f"the file ends before piece {id_} of {vocab_size}: {_AGAIN}, or take the one "
                     "that belongs to this checkpoint")  # fmt: skip
    score, nbytes = _PIECE.unpack_from(raw, at)
    at += _PIECE.size
    if not 0 <= nbytes <= len(raw) - at or nbytes > _MAX_PIECE_BYTES:
      raise fail(at, f"piece {id_} of {nbytes} bytes does not fit into the file: {_AGAIN}")
    if not math.isfinite(score):
      raise fail(at, f"piece {id_} has the score {score}: {_AGAIN}")
    try:
      pieces.append(_piece(id_, raw[at : at + nbytes]))
    except ValueError as error:
      raise fail(at, f"piece {id_}: {error}") from error
    scores.append(score)
    at += nbytes
  if at != len(raw):
    raise fail(at, f"{len(raw) - at} bytes behind the last of {vocab_size} pieces: take the "
                   "tokenizer that belongs to this checkpoint")  # fmt: skip
  return TokenizerSpec(
    kind="spm",
    tokens=tuple(pieces),
    types=("unknown", "control", "control", *["byte"] * 256, *["normal"] * (vocab_size - 259)),
    scores=tuple(scores),
    bos_id=1,
    eos_id=2,
    unknown_id=0,
    stop_ids=frozenset({2}),
    add_bos=True,
    add_space_prefix=True,
  )


def _piece(id_: int, raw: bytes) -> str:
  """The SentencePiece spelling of a piece. Raises ValueError."""
  special = {0: (b"<unk>", "<unk>"), 1: (b"\n<s>\n", "<s>"), 2: (b"\n</s>\n", "</s>")}.get(id_)
  if special is not None:
    if raw.strip() != special[1].encode():
      raise ValueError(f"{raw!r}: expected {special[0]!r}")
    return special[1]
  if id_ < 259:
    byte = id_ - 3
    spelled = f"<0x{byte:02X}>"
    if raw not in (spelled.encode(), chr(byte).encode(), bytes([byte])):
      raise ValueError(f"{raw!r}: expected {spelled} or that byte itself")
    return spelled
  return str(raw, "utf-8").replace(" ", "\u2581")


def _tensors(header: Header) -> dict[str, TensorInfo]:
  tensors, offset = {}, _HEADER.size
  for name, shape in header.shapes().items():
    nbytes = 4 * math.prod(shape)
    if not name.startswith("freq_cis"):
      tensors[name] = TensorInfo(name, "F32", shape, offset, nbytes)
    offset += nbytes
  return tensors

"""Every configuration as a frozen dataclass, with strict TOML in and out."""

import dataclasses
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

T = TypeVar("T")
RopeStyle = Literal["interleaved", "half"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The architecture of one decoder. Widths count elements, not bytes.

  rope_style says which elements of a head form a rotated pair: "interleaved" takes (2i, 2i+1),
  "half" takes (i, i + head_dim/2). qk_norm says whether each head of queries and keys passes an
  RMSNorm of its own before it is rotated (Qwen3, arXiv:2505.09388). sub_norm says whether what
  attention's heads give, and the FFN's inner product, pass one in front of the matrix that follows,
  so that every matrix of a layer has normalised inputs (SubLN, arXiv:2210.06423; BitNet b1.58).
  """

  vocab_size: int
  model_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  ffn_dim: int
  context_length: int = 2048
  rope_base: float = 10_000.0
  rope_style: RopeStyle = "half"
  norm_eps: float = 1e-6
  tied_embedding: bool = True
  qk_norm: bool = False
  sub_norm: bool = False

  def __post_init__(self) -> None:
    for name in (
      "vocab_size",
      "model_dim",
      "num_layers",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "ffn_dim",
      "context_length",
    ):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value!r}: it must be a positive integer")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads = {self.num_heads} is no multiple of num_kv_heads = {self.num_kv_heads}: "
        "every key-value head serves the same number of query heads"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim = {self.head_dim} is odd: rotary positions turn pairs")
    if self.rope_style not in typing.get_args(RopeStyle):
      raise ValueError(
        f"rope_style = {self.rope_style!r}: choose one of {typing.get_args(RopeStyle)}"
      )
    if not 0 < self.norm_eps < 1:
      raise ValueError(f"norm_eps = {self.norm_eps!r}: it must be positive and below 1")
    if not 1 < self.rope_base < math.inf:
      raise ValueError(f"rope_base = {self.rope_base!r}: it must be above 1 and finite")

  @property
  def group_size(self) -> int:
    """Query heads per key-value head (the letter G)."""
    return self.num_heads // self.num_kv_heads

  def sizes(self) -> dict[str, int]:
    """The size of each letter of the shape alphabet that the architecture fixes."""
    return {
      "L": self.num_layers,
      "D": self.model_dim,
      "F": self.ffn_dim,
      "N": self.num_heads,
      "K": self.num_kv_heads,
      "G": self.group_size,
      "H": self.head_dim,
      "V": self.vocab_size,
    }

  @classmethod
  def load(cls, path: str | Path) -> Self:
    """Read a TOML file. Raises ValueError for an unknown key, a missing one or a wrong type."""
    return from_toml(cls, Path(path).read_text(encoding="utf-8"), where=str(path))

  @classmethod
  def named(cls, arch: str) -> Self:
    """The architecture of a name in `architectures()`, or of a TOML file.

    Raises: ValueError: there is neither.
    """
    known = architectures()
    if arch in known:
      return cls.load(known[arch])
    if not Path(arch).is_file():
      raise ValueError(
        f"architecture {arch!r}: give the path of a TOML file, or one of {', '.join(known)}"
      )
    return cls.load(arch)


def architectures() -> dict[str, Path]:
  """The named architectures: configs/model/NAME.toml of the repository or the installed package."""
  package = Path(__file__).parent
  # The package's own folder is a link to the repository's, which not every copy keeps.
  folders = [folder / "configs" / "model" for folder in (package, package.parent)]
  folder = next((folder for folder in folders if folder.is_dir()), folders[0])
  return {path.stem: path for path in sorted(folder.glob("*.toml"))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
  """A contiguous range of layers, both ends included, of a model of `num_layers` layers.

  The first span of a model also holds the embedding, the last one the final norm, the head and
  the sampler.
  """

  first_layer: int
  last_layer: int
  num_layers: int

  def __post_init__(self) -> None:
    if not 0 <= self.first_layer <= self.last_layer < self.num_layers:
      raise ValueError(
        f"layers {self.first_layer}..{self.last_layer} are no range within 0..{self.num_layers - 1}"
      )

  def __len__(self) -> int:
    return self.last_layer - self.first_layer + 1

  def __str__(self) -> str:
    return f"{self.first_layer}..{self.last_layer} of {self.num_layers}"

  @property
  def is_first(self) -> bool:
    return self.first_layer == 0

  @property
  def is_last(self) -> bool:
    return self.last_layer == self.num_layers - 1

  @classmethod
  def whole(cls, config: ModelConfig) -> Self:
    return cls(first_layer=0, last_layer=config.num_layers - 1, num_layers=config.num_layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is chosen from the logits.

  Applied in this order: repetition, frequency and presence penalties; temperature; top-k; top-p
  over what top-k left; min-p over what top-p left. The log-probability reported for a token is
  that of the untouched logits.

  Attributes:
    temperature: 0 takes the likeliest token (ties: the lowest id).
    top_k: Keep the k likeliest; None keeps all. Tokens that tie with the k-th are kept.
    top_p: Keep the smallest set of likeliest tokens whose probabilities reach top_p.
    min_p: Keep tokens with at least min_p times the probability of the likeliest.
    repetition_penalty: Divides positive and multiplies negative logits of every token seen in
      prompt or answer (arXiv:1909.05858, section 4.1); 1 is off.
    presence_penalty, frequency_penalty: Subtracted once, and once per occurrence, from tokens
      of the answer so far (the OpenAI API's definition); 0 is off.
    seed: With the index of the token in the answer it determines the random draw, 64 bits.
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  seed: int = 0

  def __post_init__(self) -> None:
    def check(name: str, ok: bool, rule: str) -> None:
      if not ok:
        raise ValueError(f"{name} = {getattr(self, name)!r}: it must be {rule}")

    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name != "top_k" and not math.isfinite(value):
        raise ValueError(f"{field.name} = {value!r}: it must be finite")
    # Bounds beyond which float32 would turn a factor into 0 or infinity.
    check("temperature", 0 <= self.temperature <= 1e6, "0 (greedy) or positive, at most 1e6")
    check(
      "top_k", self.top_k is None or 1 <= self.top_k < 2**31, "between 1 and 2**31 - 1, or absent"
    )
    check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
    check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
    check("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "between 1e-6 and 1e6")
    check("presence_penalty", abs(self.presence_penalty) <= 1e6, "between -1e6 and 1e6")
    check("frequency_penalty", abs(self.frequency_penalty) <= 1e6, "between -1e6 and 1e6")
    check("seed", 0 <= self.seed < 2**64, "between 0 and 2**64 - 1")


def from_toml(cls: type[T], text: str, *, where: str = "TOML") -> T:
  """Build `cls` from TOML text; `where` names the text in errors.

  Raises: ValueError: not TOML, an unknown or missing key, or a value of the wrong type.
  """
  try:
    table = tomllib.loads(text)
  except tomllib.TOMLDecodeError as error:
    raise ValueError(f"{where}: not valid TOML: {error}") from error
  return from_dict(cls, table, where=where)


def to_toml(config: Any) -> str:
  """TOML text that `from_toml` reads back to an equal object. Absent (None) values are left out."""
  # Imported when needed: machines that only read configurations do without it.
  import tomli_w

  return tomli_w.dumps(_plain(config))


def from_dict(cls: type[T], table: dict[str, Any], *, where: str = "table") -> T:
  """Build the dataclass `cls` from plain values, recursing into nested dataclasses.

  Raises: ValueError: an unknown or missing key, a wrong type, or what `cls` itself refuses.
  """
  fields = {field.name: field for field in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  unknown = sorted(set(table) - set(fields))
  if unknown:
    raise ValueError(
      f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(fields))}"
    )
  values = {key: _coerce(hints[key], value, f"{where}: {key}") for key, value in table.items()}
  missing = [
    name
    for name, field in fields.items()
    if name not in values
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ValueError(f"{where}: missing key {missing[0]!r}")
  try:
    return cls(**values)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def _coerce(hint: Any, value: Any, where: str) -> Any:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Literal:
    if value not in args:
      raise ValueError(f"{where} = {value!r}: choose one of {', '.join(map(repr, args))}")
    return value
  if origin in (typing.Union, types.UnionType):
    inner = [arg for arg in args if arg is not type(None)]
    return _coerce(inner[0], value, where)
  if origin is tuple:
    if not isinstance(value, list | tuple):
      raise ValueError(f"{where} = {value!r}: expected a list")
    return tuple(_coerce(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, dict):
      raise ValueError(f"{where} = {value!r}: expected a table")
    return from_dict(hint, value, where=where)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
    raise ValueError(f"{where} = {value!r}: expected {hint.__name__}, got {type(value).__name__}")
  return value


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    return {key: _plain(item) for key, item in pairs if item is not None}
  if isinstance(value, tuple | list):
    return [_plain(item) for item in value]
  return value

"""Every configuration as a frozen dataclass, with strict TOML in and out."""

import dataclasses
import functools
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

T = TypeVar("T")
RopeStyle = Literal["interleaved", "half"]
Activation = Literal["silu", "gelu_tanh", "relu2"]
Mixer = Literal["attention", "convolution"]
RopeKind = Literal["linear", "llama3", "yarn", "factors", "proportional"]


def _sparse(default: Any) -> Any:
  """A field that `to_toml` leaves out while it has its default."""
  return dataclasses.field(default=default, metadata={"sparse": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How rotary frequencies depart from base**(-2i/H), for pair i of a head.

    linear        divided by `factor` (arXiv:2306.15595)
    llama3        wavelengths beyond original_context_length / low_freq_factor divided by `factor`,
                  those below original_context_length / high_freq_factor kept, a line in between
    yarn          divided by `factor` where a pair turns less than beta_slow times within
                  original_context_length, kept where more than beta_fast times, a line in between;
                  cosine and sine times attention_factor (arXiv:2309.00071)
    factors       pair i divided by factors[i], and all by `factor`
    proportional  the first part `rotated` of the pairs turn, the others do not; all by `factor`

  Attributes:
    attention_factor: yarn's; None: 0.1 ln(factor) + 1.
    truncate: yarn's: the ends of its line are whole pairs.
  """

  kind: RopeKind
  factor: float = _sparse(1.0)
  original_context_length: int | None = _sparse(None)
  low_freq_factor: float = _sparse(1.0)
  high_freq_factor: float = _sparse(4.0)
  beta_fast: float = _sparse(32.0)
  beta_slow: float = _sparse(1.0)
  attention_factor: float | None = _sparse(None)
  truncate: bool = _sparse(True)
  factors: tuple[float, ...] = _sparse(())
  rotated: float = _sparse(1.0)

  _USED: ClassVar[dict[str, tuple[str, ...]]] = {
    "linear": (),
    "llama3": ("original_context_length", "low_freq_factor", "high_freq_factor"),
    "yarn": (
      "original_context_length",
      "beta_fast",
      "beta_slow",
      "attention_factor",
      "truncate",
    ),
    "factors": ("factors",),
    "proportional": ("rotated",),
  }

  def __post_init__(self) -> None:
    if self.kind not in self._USED:
      raise ValueError(f"kind = {self.kind!r}: choose one of {', '.join(self._USED)}")
    for field in dataclasses.fields(self):
      value, used = getattr(self, field.name), ("kind", "factor", *self._USED[self.kind])
      if field.name not in used and value != field.default:
        raise ValueError(f"{field.name} = {value!r}: rope scaling {self.kind!r} has no use for it")
    for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
      _check_positive(name, getattr(self, name))
    if self.attention_factor is not None:
      _check_positive("attention_factor", self.attention_factor)
    if self.kind in ("llama3", "yarn"):
      _check_count("original_context_length", self.original_context_length)
    if self.low_freq_factor >= self.high_freq_factor:
      raise ValueError(
        f"low_freq_factor = {self.low_freq_factor} is not below high_freq_factor ="
        f" {self.high_freq_factor}"
      )
    if self.beta_slow >= self.beta_fast:
      raise ValueError(f"beta_slow = {self.beta_slow} is not below beta_fast = {self.beta_fast}")
    if self.kind == "factors" and not self.factors:
      raise ValueError("factors is empty: one for each rotated pair of a head")
    for i, value in enumerate(self.factors):
      _check_positive(f"factors[{i}]", value)
    if not 0 < self.rotated <= 1:
      raise ValueError(f"rotated = {self.rotated!r}: it must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
  """What differs between the layers of one model; None takes the model's own number.

  Attributes:
    mixer: What mixes positions: attention, or a short convolution gated on both sides (LFM2).
    rope_scaling, sliding_window: None is none.
    shared_kv: Values are what the key projection gives; there is no value projection (Gemma 4).
  """

  mixer: Mixer = _sparse("attention")
  head_dim: int | None = None
  num_kv_heads: int | None = None
  rope_base: float | None = None
  rope_scaling: RopeScaling | None = None
  sliding_window: int | None = None
  shared_kv: bool = _sparse(False)

  def __post_init__(self) -> None:
    if self.mixer not in typing.get_args(Mixer):
      raise ValueError(f"mixer = {self.mixer!r}: choose one of {typing.get_args(Mixer)}")
    more = [f.name for f in dataclasses.fields(self) if f.name != "mixer"]
    if self.mixer == "convolution" and any(getattr(self, name) for name in more):
      raise ValueError("a convolution has no heads, positions or window: leave its other keys out")
    for name in ("head_dim", "num_kv_heads", "sliding_window"):
      if getattr(self, name) is not None:
        _check_count(name, getattr(self, name))
    if self.head_dim is not None and self.head_dim % 2:
      raise ValueError(f"head_dim = {self.head_dim} is odd: rotary positions turn pairs")
    if self.rope_base is not None and not 1 < self.rope_base < math.inf:
      raise ValueError(f"rope_base = {self.rope_base!r}: it must be above 1 and finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The architecture of one decoder. Widths count elements, not bytes.

  rope_style says which elements of a head form a rotated pair: "interleaved" takes (2i, 2i+1),
  "half" takes (i, i + head_dim/2). qk_norm says whether each head of queries and keys passes an
  RMSNorm of its own before it is rotated (Qwen3, arXiv:2505.09388). sub_norm says whether what
  attention's heads give, and the FFN's inner product, pass one in front of the matrix that follows,
  so that every matrix of a layer has normalised inputs (SubLN, arXiv:2210.06423; BitNet b1.58).

  Attributes:
    activation: Of the FFN's gate; "relu2" is max(x, 0)**2, "gelu_tanh" GELU by its tanh formula.
    qkv_bias: Queries, keys and values have biases (Qwen2).
    v_norm: Each head of values is normalised, without a scale (Gemma 4).
    post_norm: What attention (or a convolution) and the FFN give passes an RMSNorm before it is
      added to the residual stream (Gemma).
    layer_scale: What a layer gives is multiplied by a stored number (Gemma 4).
    embedding_scale: Rows of the embedding times this, rounded to the compute dtype (Gemma).
    attention_scale: Of scores; None: head_dim**-0.5.
    attention_softcap, logit_softcap: c tanh(x / c) in place of x, for scores and logits (Gemma 2).
    sliding_window: Keys that a query sees, its own included (arXiv:2004.05150); None: all so far.
    num_experts, experts_per_token: The FFN is a mixture of experts of ffn_dim each: a router's
      softmax over its best few (arXiv:2401.04088); 0: one FFN.
    conv_width: Positions that a gated short convolution sees, its own included (LFM2).
    layer_kinds, layer_pattern: Layer i is of kind `layer_kinds[layer_pattern[i % length]]`; empty
      where all are alike. rope_scaling and sliding_window are then each kind's own.
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
  activation: Activation = _sparse("silu")
  qkv_bias: bool = _sparse(False)
  v_norm: bool = _sparse(False)
  post_norm: bool = _sparse(False)
  layer_scale: bool = _sparse(False)
  embedding_scale: float = _sparse(1.0)
  attention_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  sliding_window: int | None = None
  rope_scaling: RopeScaling | None = None
  num_experts: int = _sparse(0)
  experts_per_token: int = _sparse(0)
  conv_width: int = _sparse(0)
  layer_kinds: tuple[LayerKind, ...] = _sparse(())
  layer_pattern: tuple[int, ...] = _sparse(())

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
      _check_count(name, getattr(self, name))
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
    if self.activation not in typing.get_args(Activation):
      raise ValueError(
        f"activation = {self.activation!r}: choose one of {typing.get_args(Activation)}"
      )
    for name in ("embedding_scale", "attention_scale", "attention_softcap", "logit_softcap"):
      if getattr(self, name) is not None:
        _check_positive(name, getattr(self, name))
    if self.sliding_window is not None:
      _check_count("sliding_window", self.sliding_window)
    self._check_experts()
    self._check_kinds()

  def _check_experts(self) -> None:
    if self.num_experts == self.experts_per_token == 0:
      return
    _check_count("num_experts", self.num_experts)
    _check_count("experts_per_token", self.experts_per_token)
    if self.experts_per_token > self.num_experts:
      raise ValueError(
        f"experts_per_token = {self.experts_per_token} is more than num_experts = {self.num_experts}"
      )
    if self.sub_norm:
      raise ValueError("sub_norm = True: experts have no norm of their inner product: leave it out")

  def _check_kinds(self) -> None:
    if bool(self.layer_kinds) != bool(self.layer_pattern):
      raise ValueError("layer_kinds and layer_pattern go together: give both or neither")
    if len(self.layer_pattern) > self.num_layers:
      raise ValueError(
        f"layer_pattern has {len(self.layer_pattern)} entries for num_layers = {self.num_layers}"
      )
    for entry in self.layer_pattern:
      if isinstance(entry, bool) or entry not in range(len(self.layer_kinds)):
        raise ValueError(
          f"layer_pattern has {entry!r}: entries are places in the {len(self.layer_kinds)} layer_kinds"
        )
    if idle := set(range(len(self.layer_kinds))) - set(self.layer_pattern):
      raise ValueError(f"layer_kinds[{min(idle)}] is not in layer_pattern: leave it out")
    if self.layer_kinds:
      for name in ("sliding_window", "rope_scaling"):
        if getattr(self, name) is not None:
          raise ValueError(f"{name} beside layer_kinds: give it to each kind that has it")
    has_conv = any(kind.mixer == "convolution" for kind in self.layer_kinds)
    if has_conv != bool(self.conv_width) or (
      has_conv and (isinstance(self.conv_width, bool) or self.conv_width < 2)
    ):
      raise ValueError(
        f"conv_width = {self.conv_width!r}: at least 2 if a layer is a convolution, else 0"
      )
    for kind in self.kinds:
      if kind.mixer == "convolution":
        continue
      if self.num_heads % kind.num_kv_heads:
        raise ValueError(
          f"num_heads = {self.num_heads} is no multiple of a layer kind's num_kv_heads ="
          f" {kind.num_kv_heads}: every key-value head serves the same number of query heads"
        )
      scaling = kind.rope_scaling
      if scaling is not None and scaling.factors and 2 * len(scaling.factors) != kind.head_dim:
        raise ValueError(
          f"rope scaling has {len(scaling.factors)} factors for heads of {kind.head_dim}:"
          " one for each pair"
        )

  @property
  def kinds(self) -> tuple[LayerKind, ...]:
    """The kinds of layers, every number filled in; one where all layers are alike."""
    if not self.layer_kinds:
      return (
        LayerKind(
          head_dim=self.head_dim,
          num_kv_heads=self.num_kv_heads,
          rope_base=self.rope_base,
          rope_scaling=self.rope_scaling,
          sliding_window=self.sliding_window,
        ),
      )
    return tuple(
      kind
      if kind.mixer == "convolution"
      else dataclasses.replace(
        kind,
        head_dim=kind.head_dim or self.head_dim,
        num_kv_heads=kind.num_kv_heads or self.num_kv_heads,
        rope_base=kind.rope_base or self.rope_base,
      )
      for kind in self.layer_kinds
    )

  def kind_index(self, layer: int) -> int:
    """Which of `kinds` a layer is."""
    return self.layer_pattern[layer % len(self.layer_pattern)] if self.layer_pattern else 0

  def kind(self, layer: int) -> LayerKind:
    """What a layer is, every number filled in."""
    return self.kinds[self.kind_index(layer)]

  def beyond_plain(self) -> dict[str, Any]:
    """What this has and the plain decoder lacks: fields and their values, from `activation` on.

    The plain decoder is Llama's (with qk_norm and sub_norm): programs that compute nothing else ask
    here, so that they refuse what they would compute wrongly.
    """
    fields = dataclasses.fields(self)
    first = next(i for i, field in enumerate(fields) if field.name == "activation")
    values = {field.name: getattr(self, field.name) for field in fields[first:]}
    return {f.name: values[f.name] for f in fields[first:] if values[f.name] != f.default}

  @property
  def group_size(self) -> int:
    """Query heads per key-value head (the letter G)."""
    return self.num_heads // self.num_kv_heads

  def sizes(self, layer: int | None = None) -> dict[str, int]:
    """The size of each letter of the shape alphabet that the architecture fixes.

    Beside the common ones: E experts, W width of a convolution, M its channels, C the 3 M outputs of
    the projection in front of it.

    Args:
      layer: Whose K, G and H; None: the model's own.
    """
    kind = LayerKind() if layer is None else self.kind(layer)
    num_kv_heads = kind.num_kv_heads or self.num_kv_heads
    return {
      "L": self.num_layers,
      "D": self.model_dim,
      "F": self.ffn_dim,
      "N": self.num_heads,
      "K": num_kv_heads,
      "G": self.num_heads // num_kv_heads,
      "H": kind.head_dim or self.head_dim,
      "V": self.vocab_size,
      "E": self.num_experts,
      "W": self.conv_width,
      "M": self.model_dim,
      "C": 3 * self.model_dim,
      "1": 1,
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


def _check_count(name: str, value: Any) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f"{name} = {value!r}: it must be a positive integer")


def _check_positive(name: str, value: Any) -> None:
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
    raise ValueError(f"{name} = {value!r}: it must be positive and finite")


def architectures() -> dict[str, Path]:
  """The named architectures: configs/model/NAME.toml of the repository or the installed package."""
  return named_configs("model")


def named_configs(kind: str) -> dict[str, Path]:
  """By name what is in the folder configs/KIND of the repository or the installed package."""
  package = Path(__file__).parent
  # The package's own folder is a link to the repository's, which not every copy keeps.
  folders = [folder / "configs" / kind for folder in (package, package.parent)]
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
  """TOML text that `from_toml` reads back to an equal object.

  Absent values (None) are left out, and of what few models have (`_sparse`) the defaults.
  """
  # Imported when needed: machines that only read configurations do without it.
  import tomli_w

  return tomli_w.dumps(_plain(config))


def from_dict(cls: type[T], table: dict[str, Any], *, where: str = "table") -> T:
  """Build the dataclass `cls` from plain values, recursing into nested dataclasses.

  Raises: ValueError: an unknown or missing key, a wrong type, or what `cls` itself refuses.
  """
  fields = {field.name: field for field in dataclasses.fields(cls)}
  hints = _hints(cls)
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


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _coerce(hint: Any, value: Any, where: str) -> Any:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Literal:
    if value not in args:
      raise ValueError(f"{where} = {value!r}: choose one of {', '.join(map(repr, args))}")
    return value
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in args:
      return None
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
    pairs = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
    return {
      f.name: _plain(item)
      for f, item in pairs
      if item is not None and not (f.metadata.get("sparse") and item == f.default)
    }
  if isinstance(value, tuple | list):
    return [_plain(item) for item in value]
  return value

"""Reads and writes GGUF's keys for models whose layers differ: windows, head widths, convolutions."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from neurojax.config import LayerKind, ModelConfig, RopeScaling
from neurojax.files.names.architecture import Demand, Fault, short, with_kinds
from neurojax.files.tensor_info import TensorInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
  """The facts about a file from which its layers are read.

  Attributes:
    name: The name of the architecture.
    get: Gives the value of a key, without its leading "{name}.", or a default.
    values: The fields of ModelConfig that are known so far.
    tensors: The tensors of the file.
    scaling: The model's own scaling of rotary positions.
  """

  name: str
  get: Callable[..., object]
  values: Mapping[str, object]
  tensors: Mapping[str, TensorInfo]
  scaling: RopeScaling | None

  @property
  def num_layers(self) -> int:
    count = self.values["num_layers"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
      raise Fault(f"{self.name}.block_count = {short(count)}: it must be a positive integer")
    return count

  def count(self, suffix: str, default: int | None = None) -> int:
    """A key that is a whole number, 0 included."""
    value = self.get(suffix, default)
    if isinstance(value, list):
      raise Demand(f"{self.name}.{suffix} = {short(value)}: one number for all layers is known")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
      raise Fault(f"{self.name}.{suffix} = {short(value)}: expected one whole number")
    return value

  def number(self, suffix: str, default: float) -> float:
    value = self.get(suffix, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise Fault(f"{self.name}.{suffix} = {short(value)}: expected one number")
    return float(value)

  def of_layers(self, suffix: str, value: object) -> Sequence[int]:
    """The value of a key for each layer, from a list or from one number for all."""
    count = self.num_layers
    if isinstance(value, int):
      # A number of layers that the file has no tensors for is told later, and must cost nothing.
      if count > len(self.tensors):
        raise Fault(f"{self.name}.block_count = {count} of a file of {len(self.tensors)} tensors")
      return [int(value)] * count
    if (
      not isinstance(value, list)
      or len(value) != count
      or not all(type(v) in (int, bool) for v in value)
    ):
      raise Fault(
        f"{self.name}.{suffix} = {short(value)}: expected {count} whole numbers, a layer each"
      )
    return [int(v) for v in value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
  """The keys of an architecture for numbers that differ between layers.

  Attributes:
    keys: Metadata keys that `read` looks at.
    read: Gives the fields of ModelConfig that follow. Raises Fault, Demand, or ValueError.
    write: Gives key to value (None: left out) for a configuration. Raises ValueError: there are no words
      for it.
    takes_kv_heads: Whether the number of key-value heads may be a list, which `read` resolves.
  """

  keys: tuple[str, ...]
  read: Callable[[Facts], dict[str, object]]
  write: Callable[[ModelConfig], dict[str, object]]
  takes_kv_heads: bool = False


def root_of_width(values: Mapping[str, object]) -> float:
  """Gemma's scale of embeddings, in float32 as llama.cpp has it."""
  return math.sqrt(values["model_dim"])  # type: ignore[arg-type]


_WINDOW = "attention.sliding_window"
_PATTERN = "attention.sliding_window_pattern"
_BASE_SWA = "rope.freq_base_swa"


def _write_scaling(scaling: RopeScaling | None) -> dict[str, object]:
  if scaling is None:
    return {}
  if scaling.kind == "linear":
    return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
  if scaling.kind == "factors":
    # The factors are a tensor.
    factor = None if scaling.factor == 1 else scaling.factor
    return {"rope.scaling.factor": factor}
  if scaling.kind == "yarn" and scaling.truncate:
    default = 0.1 * math.log(scaling.factor) + 1
    attention = scaling.attention_factor
    return {
      "rope.scaling.type": "yarn",
      "rope.scaling.factor": scaling.factor,
      "rope.scaling.original_context_length": scaling.original_context_length,
      "rope.scaling.attn_factor": None if attention is None else attention / default,
      "rope.scaling.yarn_beta_fast": None if scaling.beta_fast == 32 else scaling.beta_fast,
      "rope.scaling.yarn_beta_slow": None if scaling.beta_slow == 1 else scaling.beta_slow,
    }
  raise ValueError(f"rope scaling {scaling.kind!r} has no words here: write it as factors")


def _read_alike(facts: Facts) -> dict[str, object]:
  return {"rope_scaling": facts.scaling}


def _write_alike(config: ModelConfig) -> dict[str, object]:
  if config.layer_kinds:
    raise ValueError("layer_kinds: its layers are alike")
  if config.sliding_window is not None:
    raise ValueError(f"sliding_window = {config.sliding_window}: it has no window")
  return _write_scaling(config.rope_scaling)


def _read_window(facts: Facts) -> dict[str, object]:
  return {"rope_scaling": facts.scaling, "sliding_window": facts.count(_WINDOW, 0) or None}


def _write_window(config: ModelConfig) -> dict[str, object]:
  alike = _write_alike(dataclasses.replace(config, sliding_window=None))
  return {**alike, _WINDOW: config.sliding_window}


def _pattern(facts: Facts) -> list[bool]:
  """For each layer, whether it has the window: the file lists it, or every n-th layer has none."""
  value = facts.get(_PATTERN, 6)
  if isinstance(value, list):
    return [bool(v) for v in facts.of_layers(_PATTERN, value)]
  if type(value) is bool:
    return [value] * len(facts.of_layers(_PATTERN, 1))
  every = facts.count(_PATTERN, 6)
  return [every == 0 or i % every < every - 1 for i in range(len(facts.of_layers(_PATTERN, 1)))]


def _read_gemma3(facts: Facts) -> dict[str, object]:
  values = facts.values
  # src/models/gemma3.cpp knows the 27B model, whose scale is another, by its 62 layers.
  is_27b = facts.num_layers == 62
  scale = (values["model_dim"] // values["num_heads"]) ** -0.5 if is_27b else None  # type: ignore[operator]
  window = facts.count(_WINDOW, 0) or None
  base = values["rope_base"]
  own = LayerKind(rope_base=base, rope_scaling=facts.scaling)  # type: ignore[arg-type]
  if window is None:
    return {"attention_scale": scale, "rope_scaling": facts.scaling}
  local = LayerKind(rope_base=facts.number(_BASE_SWA, 10_000.0), sliding_window=window)
  of_layer = [0 if slides else 1 for slides in _pattern(facts)]
  return {"attention_scale": scale, **with_kinds([local, own], of_layer, base)}  # type: ignore[arg-type]


def _write_gemma3(config: ModelConfig) -> dict[str, object]:
  if not config.layer_kinds:
    if config.sliding_window is None:
      return _write_scaling(config.rope_scaling)
    every = [True] * config.num_layers
    local, own = dataclasses.replace(config.kinds[0]), None
  else:
    every = [config.kind(i).sliding_window is not None for i in range(config.num_layers)]
    local = next((k for k in config.kinds if k.sliding_window is not None), None)
    own = next((k for k in config.kinds if k.sliding_window is None), None)
    if len(config.kinds) > 2:
      raise ValueError("layer_kinds: a local and a global one are written")
  if local is not None and local.rope_scaling is not None:
    raise ValueError("layer_kinds: local layers have no rope scaling")
  base = config.rope_base if own is None else own.rope_base
  return {
    "rope.freq_base": base,
    **_write_scaling(None if own is None else own.rope_scaling),
    _WINDOW: None if local is None else local.sliding_window,
    _BASE_SWA: None if local is None else local.rope_base,
    _PATTERN: every,
  }


def _read_gemma4(facts: Facts) -> dict[str, object]:
  values, tensors = facts.values, facts.tensors
  slides = [bool(v) for v in facts.of_layers(_PATTERN, facts.get(_PATTERN))]
  kv_heads = facts.of_layers("attention.head_count_kv", values["num_kv_heads"])
  window, wide = facts.count(_WINDOW), facts.count("attention.key_length")
  for suffix in ("attention.value_length", "rope.dimension_count"):
    if facts.count(suffix, wide) != wide:
      raise Demand(f"{facts.name}.{suffix} differs from {facts.name}.attention.key_length = {wide}")
  base = values["rope_base"]
  kinds, of_layer = [], []
  for layer, is_local in enumerate(slides):
    shared = f"blk.{layer}.attn_v.weight" not in tensors
    if is_local:
      if shared:
        raise Fault(f"the tensor 'blk.{layer}.attn_v.weight' is missing: the file is incomplete")
      kinds.append(
        LayerKind(
          num_kv_heads=kv_heads[layer],
          rope_base=facts.number(_BASE_SWA, 10_000.0),
          sliding_window=window,
        )
      )
    else:
      kinds.append(
        LayerKind(
          head_dim=wide,
          num_kv_heads=kv_heads[layer],
          rope_base=base,  # type: ignore[arg-type]
          rope_scaling=_proportional(facts.scaling),
          shared_kv=shared,
        )
      )
    of_layer.append(layer)
  locals_ = [kv_heads[i] for i, is_local in enumerate(slides) if is_local] or kv_heads
  own = locals_[0]
  kinds = [dataclasses.replace(k, num_kv_heads=None) if k.num_kv_heads == own else k for k in kinds]
  kinds = [
    dataclasses.replace(k, head_dim=None) if k.head_dim == values["head_dim"] else k for k in kinds
  ]
  return {"num_kv_heads": own, **with_kinds(kinds, of_layer, base)}  # type: ignore[arg-type]


def _proportional(scaling: RopeScaling | None) -> RopeScaling | None:
  """Factors of 1 for the first pairs and beyond measure for the others: these do not turn."""
  if scaling is None or scaling.kind != "factors":
    return scaling
  turning = sum(1 for value in scaling.factors if value == 1)
  if not 0 < turning < len(scaling.factors) or any(v < 1e29 for v in scaling.factors[turning:]):
    return scaling
  return RopeScaling(
    kind="proportional", factor=scaling.factor, rotated=turning / len(scaling.factors)
  )


def _write_gemma4(config: ModelConfig) -> dict[str, object]:
  local = next((k for k in config.kinds if k.sliding_window is not None), None)
  own = next((k for k in config.kinds if k.sliding_window is None), None)
  if local is None or own is None or len(config.kinds) != 2:
    raise ValueError("layer_kinds: a local and a global one are written")
  scaling = own.rope_scaling
  if scaling is not None and scaling.kind not in ("proportional", "factors"):
    raise ValueError(f"rope scaling {scaling.kind!r}: proportional is written")
  kinds = [config.kind(i) for i in range(config.num_layers)]
  return {
    "attention.head_count_kv": [kind.num_kv_heads for kind in kinds],
    "attention.key_length": own.head_dim,
    "attention.value_length": own.head_dim,
    "rope.dimension_count": own.head_dim,
    "rope.freq_base": own.rope_base,
    _WINDOW: local.sliding_window,
    _BASE_SWA: local.rope_base,
    _PATTERN: [kind.sliding_window is not None for kind in kinds],
    "attention.shared_kv_layers": 0,
    "embedding_length_per_layer_input": 0,
    "rope.scaling.factor": None if scaling is None or scaling.factor == 1 else scaling.factor,
  }


def _read_lfm2(facts: Facts) -> dict[str, object]:
  values = facts.values
  kv_heads = facts.of_layers("attention.head_count_kv", values["num_kv_heads"])
  own = {count for count in kv_heads if count}
  if len(own) != 1:
    raise Demand(
      f"{facts.name}.attention.head_count_kv = {short(list(kv_heads))}: one number, or 0"
    )
  kinds = [
    LayerKind(mixer="convolution"),
    LayerKind(rope_base=values["rope_base"], rope_scaling=facts.scaling),
  ]  # type: ignore[arg-type]
  of_layer = [1 if count else 0 for count in kv_heads]
  width = facts.count("shortconv.l_cache", 0) if 0 in of_layer else 0
  return {
    "num_kv_heads": own.pop(),
    "conv_width": width,
    **with_kinds(kinds, of_layer, values["rope_base"]),  # type: ignore[arg-type]
  }


def _write_lfm2(config: ModelConfig) -> dict[str, object]:
  kinds = [config.kind(i) for i in range(config.num_layers)]
  if len({kind for kind in kinds if kind.mixer == "attention"}) > 1:
    raise ValueError("layer_kinds: layers with attention are alike")
  attention = next((kind for kind in kinds if kind.mixer == "attention"), None)
  if attention is not None and attention.sliding_window is not None:
    raise ValueError(f"sliding_window = {attention.sliding_window}: it has no window")
  return {
    "attention.head_count_kv": [kind.num_kv_heads or 0 for kind in kinds],
    "shortconv.l_cache": config.conv_width,
    **_write_scaling(None if attention is None else attention.rope_scaling),
  }


ALIKE = Layers(keys=(), read=_read_alike, write=_write_alike)
WINDOW = Layers(keys=(_WINDOW,), read=_read_window, write=_write_window)
GEMMA3 = Layers(keys=(_WINDOW, _PATTERN, _BASE_SWA), read=_read_gemma3, write=_write_gemma3)
GEMMA4 = Layers(
  keys=(
    _WINDOW, _PATTERN, _BASE_SWA, "attention.key_length", "attention.value_length",
    "rope.dimension_count",
  ),
  read=_read_gemma4,
  write=_write_gemma4,
  takes_kv_heads=True,
)  # fmt: skip
LFM2 = Layers(keys=("shortconv.l_cache",), read=_read_lfm2, write=_write_lfm2, takes_kv_heads=True)

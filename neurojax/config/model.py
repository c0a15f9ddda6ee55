"""The architecture of one decoder."""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any, Literal, Self

from neurojax.config.checks import check_count, check_positive
from neurojax.config.layers import LayerKind, RopeScaling
from neurojax.config.toml import from_dict, named_configs, parse_toml

RopeStyle = Literal["interleaved", "half"]
Activation = Literal["silu", "gelu_tanh", "relu2"]


def _beyond(default: Any) -> Any:
  """A field of what the plain decoder lacks, see `ModelConfig.beyond_plain`; few models have it."""
  return dataclasses.field(default=default, metadata={"sparse": True, "plain": False})


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

  Example:
    >>> import neurojax as nj
    >>> config = nj.ModelConfig.named("bonsai-8b")
    >>> config.num_layers, config.model_dim
    (36, 4096)
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
  activation: Activation = _beyond("silu")
  qkv_bias: bool = _beyond(False)
  v_norm: bool = _beyond(False)
  post_norm: bool = _beyond(False)
  layer_scale: bool = _beyond(False)
  embedding_scale: float = _beyond(1.0)
  attention_scale: float | None = _beyond(None)
  attention_softcap: float | None = _beyond(None)
  logit_softcap: float | None = _beyond(None)
  sliding_window: int | None = _beyond(None)
  rope_scaling: RopeScaling | None = _beyond(None)
  num_experts: int = _beyond(0)
  experts_per_token: int = _beyond(0)
  conv_width: int = _beyond(0)
  layer_kinds: tuple[LayerKind, ...] = _beyond(())
  layer_pattern: tuple[int, ...] = _beyond(())

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
      check_count(name, getattr(self, name))
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
        check_positive(name, getattr(self, name))
    if self.sliding_window is not None:
      check_count("sliding_window", self.sliding_window)
    self._check_experts()
    self._check_kinds()

  def _check_experts(self) -> None:
    if self.num_experts == self.experts_per_token == 0:
      return
    check_count("num_experts", self.num_experts)
    check_count("experts_per_token", self.experts_per_token)
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
    """Fields, with their values, that are set to something that the plain decoder lacks.

    The plain decoder is Llama's (with qk_norm and sub_norm): programs that compute nothing else ask
    here, so that they refuse what they would compute wrongly.
    """
    fields = [f for f in dataclasses.fields(self) if not f.metadata.get("plain", True)]
    values = {field.name: getattr(self, field.name) for field in fields}
    return {f.name: values[f.name] for f in fields if values[f.name] != f.default}

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
    """Read the TOML file of an architecture, or the [model] table of a training configuration.

    Raises: ValueError: not TOML, an unknown or missing key, or a value of the wrong type.
    """
    where = str(path)
    table = parse_toml(Path(path).read_text(encoding="utf-8"), where=where)
    if isinstance(table.get("model"), dict):
      table, where = table["model"], f"{where}: model"
    return from_dict(cls, table, where=where)

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
  return named_configs("model")

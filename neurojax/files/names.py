"""What each architecture calls its tensors and its numbers, as data, and what the model refuses.

A canonical name ends in the letters of its axes: D model width, F FFN width, N query heads,
K key-value heads, H head width, V vocabulary. Names in `PER_LAYER` exist once per layer and carry
no layer axis.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from neurojax.config import ModelConfig, RopeStyle
from neurojax.files.source import TensorInfo

WHOLE_MODEL = ("embedding_VD", "final_norm_D", "head_DV")
PER_LAYER = (
  "attn_norm_D", "q_DNH", "k_DKH", "v_DKH", "q_norm_H", "k_norm_H", "attn_sub_norm_NH", "o_NHD",
  "ffn_norm_D", "gate_DF", "up_DF", "ffn_sub_norm_F", "down_FD",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where a file keeps a tensor.

  Attributes:
    name: The file's name, with {layer} where the layer's number goes.
    axes: The row-major axes, apart by spaces; letters within one axis are flattened together
      ("NH D" is a matrix of N*H rows and D columns).
  """

  name: str
  axes: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """One family of GGUF models. Keys are written without the leading "{arch}.".

  Attributes:
    rope_style: How the converter left the rows of q and k.
    tensors: Canonical name to the tensor in the file; "q_norm_H" among them says qk_norm, and
      "ffn_sub_norm_F" sub_norm; without "head_DV" the embedding is always tied.
    keys: ModelConfig field to metadata key.
    defaults: What the format says a field is when its key is absent.
    same_as: Keys that must repeat a ModelConfig field, because the model has no second number.
    neutral: Other keys and the values under which they change nothing (None: any value).
      A key of the architecture that stands nowhere here is refused.
  """

  rope_style: RopeStyle
  tensors: Mapping[str, Stored]
  keys: Mapping[str, str]
  defaults: Mapping[str, float]
  same_as: Mapping[str, str]
  neutral: Mapping[str, tuple[object, ...] | None]

  def metadata(self, name: str, config: ModelConfig) -> dict[str, int | float]:
    """What a file of this architecture, called `name`, says of a configuration: key to value."""
    fields = {key: field for field, key in self.keys.items()} | dict(self.same_as)
    return {f"{name}.{key}": getattr(config, field) for key, field in fields.items()}


# Source: gguf-py, constants.py and tensor_mapping.py; convert_hf_to_gguf.py, LlamaModel.permute:
# q and k rows are permuted so that rotary pairs are neighbours.
_LLAMA = Architecture(
  rope_style="interleaved",
  tensors={
    "embedding_VD": Stored("token_embd.weight", "V D"),
    "final_norm_D": Stored("output_norm.weight", "D"),
    "head_DV": Stored("output.weight", "V D"),
    "attn_norm_D": Stored("blk.{layer}.attn_norm.weight", "D"),
    "q_DNH": Stored("blk.{layer}.attn_q.weight", "NH D"),
    "k_DKH": Stored("blk.{layer}.attn_k.weight", "KH D"),
    "v_DKH": Stored("blk.{layer}.attn_v.weight", "KH D"),
    "o_NHD": Stored("blk.{layer}.attn_output.weight", "D NH"),
    "ffn_norm_D": Stored("blk.{layer}.ffn_norm.weight", "D"),
    "gate_DF": Stored("blk.{layer}.ffn_gate.weight", "F D"),
    "up_DF": Stored("blk.{layer}.ffn_up.weight", "F D"),
    "down_FD": Stored("blk.{layer}.ffn_down.weight", "D F"),
  },
  keys={
    "model_dim": "embedding_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "ffn_dim": "feed_forward_length",
    "context_length": "context_length",
    "rope_base": "rope.freq_base",
    "norm_eps": "attention.layer_norm_rms_epsilon",
  },
  defaults={"rope_base": 10_000.0},
  same_as={"rope.dimension_count": "head_dim", "attention.value_length": "head_dim"},
  neutral={
    "vocab_size": None,  # the embedding's rows count
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "rope.scaling.type": ("none", "linear"),  # linear is neutral while its factor is
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (1,),  # the old spelling
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.original_context_length": None,  # used by yarn and longrope only
    "rope.scaling.finetuned": None,
  },
)

ARCHITECTURES: Mapping[str, Architecture] = {
  "llama": _LLAMA,
  # Source: llama.cpp, src/models/qwen3.cpp. Its converter leaves q and k as they are trained.
  "qwen3": dataclasses.replace(
    _LLAMA,
    rope_style="half",
    tensors={
      **_LLAMA.tensors,
      "q_norm_H": Stored("blk.{layer}.attn_q_norm.weight", "H"),
      "k_norm_H": Stored("blk.{layer}.attn_k_norm.weight", "H"),
    },
  ),
  # Source: llama.cpp, src/models/bitnet.cpp (SiLU, no other head than the embedding) and
  # llama_model_rope_type: neighbours of a pair are half a head apart.
  "bitnet": dataclasses.replace(
    _LLAMA,
    rope_style="half",
    tensors={
      **{name: tensor for name, tensor in _LLAMA.tensors.items() if name != "head_DV"},
      "attn_sub_norm_NH": Stored("blk.{layer}.attn_sub_norm.weight", "NH"),
      "ffn_sub_norm_F": Stored("blk.{layer}.ffn_sub_norm.weight", "F"),
    },
  ),
}

# llama2.c keeps each kind of tensor for all layers in one block; the reader cuts out the layer.
LLAMA2C: Mapping[str, Stored] = {
  "embedding_VD": Stored("token_embedding_table", "V D"),
  "final_norm_D": Stored("rms_final_weight", "D"),
  "head_DV": Stored("wcls", "V D"),
  "attn_norm_D": Stored("rms_att_weight", "D"),
  "q_DNH": Stored("wq", "NH D"),
  "k_DKH": Stored("wk", "KH D"),
  "v_DKH": Stored("wv", "KH D"),
  "o_NHD": Stored("wo", "D NH"),
  "ffn_norm_D": Stored("rms_ffn_weight", "D"),
  "gate_DF": Stored("w1", "F D"),
  "up_DF": Stored("w3", "F D"),
  "down_FD": Stored("w2", "D F"),
}

# Keys outside the architecture's own namespace that change what a file means: (key, values under
# which it changes nothing, what to do).
_GENERAL_NEUTRAL: tuple[tuple[str, tuple[object, ...], str], ...] = (
  ("general.type", ("model",), "adapters and projectors are not models"),
  ("general.quantization_version", (0, 2), "quantize it again with a current llama.cpp"),
  ("split.count", (0, 1), "join the parts first: llama-gguf-split --merge"),
)

# A namespace that says: products need their activations rotated first (PrismML's llama.cpp).
_ROTATED = "prism.hadamard."

# Why a tensor has no canonical name, by what its name contains; the first match counts.
_UNMAPPED: tuple[tuple[str, str], ...] = (
  ("rope_freqs.", "rotary factors per dimension"),
  ("attn_q_norm.", "normalised queries"),
  ("attn_k_norm.", "normalised keys"),
  (".bias", "biases"),
  ("_exps.", "a mixture of experts"),
  ("ffn_gate_inp", "a mixture of experts"),
  ("_norm.", "a further normalisation"),
  (".lora_", "a LoRA adapter"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpretation:
  """What the names make of a file.

  Attributes:
    architecture: As the file names it, or None.
    config: The numbers as stated, even where the file is refused; None when they make no model.
    tensors: Canonical name to stored tensor; without "head_DV" when the embedding is tied, and
      without names that the architecture does not have.
    demands: What the file asks for and the model does not compute.
    faults: Where the file contradicts itself or lacks something.
  """

  architecture: str | None
  config: ModelConfig | None
  tensors: Mapping[str, Stored]
  demands: tuple[str, ...] = ()
  faults: tuple[str, ...] = ()

  def model_config(self, where: str) -> ModelConfig:
    """The config of a file that is neither refused nor faulty; `where` names it in errors.

    Raises: NotImplementedError (demands) or ValueError (faults).
    """
    if self.demands:
      raise NotImplementedError(f"{where}: not supported: {'; '.join(self.demands)}")
    if self.faults or self.config is None:
      raise ValueError(f"{where}: {'; '.join(self.faults)}")
    return self.config


def interpret(metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> Interpretation:
  """Map a GGUF file's own words to a ModelConfig and canonical names. Never raises: see the lists
  of the result."""
  demands = []
  for key, neutral, remedy in _GENERAL_NEUTRAL:
    if metadata.get(key, neutral[0]) not in neutral:
      demands.append(f"{key} = {_short(metadata[key])}: {remedy}")
  if rotated := [key for key in metadata if key.startswith(_ROTATED)]:
    demands.append(f"{rotated[0]}: its weights are folded into a Hadamard rotation of activations")
  name = metadata.get("general.architecture")
  if not isinstance(name, str):
    fault = f"general.architecture = {_short(name)}: it must be a string"
    return Interpretation(
      architecture=None, config=None, tensors={}, demands=tuple(demands), faults=(fault,)
    )
  arch = ARCHITECTURES.get(name)
  if arch is None:
    demands.append(
      f"architecture {_short(name)}; the known ones are {', '.join(sorted(ARCHITECTURES))}"
    )
    return Interpretation(architecture=name, config=None, tensors={}, demands=tuple(demands))
  stored = dict(arch.tensors)
  if "head_DV" in stored and stored["head_DV"].name not in tensors:
    del stored["head_DV"]

  config, faults = _config(arch, name, metadata, tensors)
  demands += _key_demands(arch, name, metadata, config)
  demands += _tensor_demands(stored, tensors)
  if config is not None and not faults:
    faults += _tensor_faults(stored, tensors, config)
  return Interpretation(
    architecture=name, config=config, tensors=stored, demands=tuple(demands), faults=tuple(faults)
  )


def locate(
  tensors: Mapping[str, Stored], name: str, layer: int | None, config: ModelConfig
) -> Stored:
  """The stored tensor of a canonical name, its layer filled in. Raises ValueError."""
  if name not in WHOLE_MODEL and name not in PER_LAYER:
    raise ValueError(
      f"{name!r} is no parameter; choose one of {', '.join(WHOLE_MODEL + PER_LAYER)}"
    )
  if name not in tensors:
    why = "the model ties it to its embedding: read 'embedding_VD'"
    raise ValueError(f"{name!r}: {why if name == 'head_DV' else 'this architecture has none'}")
  stored = tensors[name]
  if name in WHOLE_MODEL:
    if layer is not None:
      raise ValueError(f"layer = {layer!r}: {name!r} belongs to the whole model: leave it None")
    return stored
  if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < config.num_layers:
    raise ValueError(f"layer = {layer!r} of {name!r}: choose one of 0..{config.num_layers - 1}")
  return Stored(stored.name.format(layer=layer), stored.axes)


def file_shape(axes: str, config: ModelConfig) -> tuple[int, ...]:
  """The row-major shape of stored axes such as "NH D"."""
  sizes = config.sizes()
  return tuple(math.prod(sizes[letter] for letter in axis) for axis in axes.split())


def to_canonical(values: np.ndarray, name: str, axes: str, config: ModelConfig) -> np.ndarray:
  """A view of `values` (stored as `axes`) with the axes that the canonical name spells."""
  sizes = config.sizes()
  letters = axes.replace(" ", "")
  order = [letters.index(letter) for letter in name.rpartition("_")[2]]
  return values.reshape([sizes[letter] for letter in letters]).transpose(order)


def _config(
  arch: Architecture,
  name: str,
  metadata: Mapping[str, object],
  tensors: Mapping[str, TensorInfo],
) -> tuple[ModelConfig | None, list[str]]:
  values: dict[str, int | float] = dict(arch.defaults)
  faults = []
  for field, suffix in arch.keys.items():
    key = f"{name}.{suffix}"
    if key not in metadata:
      continue
    value = _uniform(metadata[key])
    if isinstance(value, bool) or not isinstance(value, int | float):
      faults.append(f"{key} = {_short(value)}: expected one number")
    elif field in ("rope_base", "norm_eps"):
      values[field] = float(value)
    else:
      values[field] = value
  embedding = tensors.get(arch.tensors["embedding_VD"].name)
  if embedding is not None and len(embedding.shape) == 2:
    values["vocab_size"] = embedding.shape[0]
  elif not tensors:
    faults.append("it holds a vocabulary and no tensors: this is not a whole model")
  else:
    faults.append(f"it lacks the matrix {arch.tensors['embedding_VD'].name!r}")
  if "num_heads" in values and "model_dim" in values:
    model_dim, num_heads = values["model_dim"], values["num_heads"]
    values.setdefault("num_kv_heads", num_heads)
    if "head_dim" not in values:
      if num_heads < 1 or model_dim % num_heads:
        faults.append(
          f"{name}.{arch.keys['model_dim']} = {model_dim} is no multiple of "
          f"{name}.{arch.keys['num_heads']} = {num_heads}, and {arch.keys['head_dim']} is absent"
        )
      else:
        values["head_dim"] = model_dim // num_heads
  # A missing head count would otherwise hide behind the head width that follows from it.
  lacking = [field for field in arch.keys if field not in values]
  if lacking and not faults:
    faults.append(f"the metadata lack {name}.{arch.keys[lacking[0]]}")
  if faults:
    return None, faults
  tied = "head_DV" not in arch.tensors or arch.tensors["head_DV"].name not in tensors
  try:
    return ModelConfig(
      **values,  # type: ignore[arg-type]
      rope_style=arch.rope_style,
      tied_embedding=tied,
      qk_norm="q_norm_H" in arch.tensors,
      sub_norm="ffn_sub_norm_F" in arch.tensors,
    ), []
  except ValueError as error:
    return None, [str(error)]


def _key_demands(
  arch: Architecture, name: str, metadata: Mapping[str, object], config: ModelConfig | None
) -> Iterator[str]:
  known = set(arch.keys.values())
  for key in metadata:
    if not key.startswith(f"{name}."):
      continue
    suffix = key.removeprefix(f"{name}.")
    if suffix in known:
      continue
    value = _uniform(metadata[key])
    if suffix in arch.same_as:
      field = arch.same_as[suffix]
      if config is not None and value != getattr(config, field):
        yield f"{key} = {_short(value)} differs from {field} = {getattr(config, field)}"
    elif suffix not in arch.neutral:
      yield f"{key} = {_short(value)}: the {name} reader does not know this key"
    else:
      neutral = arch.neutral[suffix]
      if neutral is not None and value not in neutral:
        yield f"{key} = {_short(value)}"


def _tensor_demands(
  stored: Mapping[str, Stored], tensors: Mapping[str, TensorInfo]
) -> Iterator[str]:
  known = {tensor.name for tensor in stored.values()}
  groups: dict[str, list[str]] = {}
  for name in tensors:
    template = re.sub(r"\.(0|[1-9][0-9]{0,8})\.", ".{layer}.", name, count=1)
    if template not in known:
      groups.setdefault(template, []).append(name)
  for names in groups.values():
    first = names[0]
    why = next((why for part, why in _UNMAPPED if part in first), "no place in this architecture")
    more = f" and {len(names) - 1} more like it" if len(names) > 1 else ""
    yield f"tensor {_short(first)}{more}: {why}"


def _tensor_faults(
  stored: Mapping[str, Stored], tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> Iterator[str]:
  # A hostile block_count must not cost time: the first absent tensor ends the loop.
  expected: dict[str, Stored] = {}
  for layer in range(config.num_layers):
    for name, tensor in stored.items():
      if name in WHOLE_MODEL and layer:
        continue
      file_name = tensor.name.format(layer=layer)
      if file_name not in tensors:
        yield f"the tensor {file_name!r} is missing: the file is incomplete"
        return
      expected[file_name] = tensor
  for name, info in tensors.items():
    if name in expected:
      shape = file_shape(expected[name].axes, config)
      if info.shape != shape:
        yield f"tensor {name!r} has the shape {info.shape}, its metadata ask for {shape}"
        return
    elif re.sub(r"\.[0-9]+\.", ".{layer}.", name, count=1) in {s.name for s in stored.values()}:
      yield f"tensor {_short(name)} is beyond the {config.num_layers} layers of the metadata"
      return


def _uniform(value: object) -> object:
  """A list that repeats one number (a value per layer) as that number."""
  if isinstance(value, list) and value and isinstance(value[0], int | float):
    return value[0] if all(item == value[0] for item in value) else value
  return value


def _short(value: object) -> str:
  text = repr(value[:8]) if isinstance(value, str | list) and len(value) > 80 else repr(value)
  return text if len(text) <= 120 else text[:117] + "..."

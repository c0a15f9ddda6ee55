"""Maps GGUF's names for tensors and numbers of each architecture, and refuses by name.

Sources: llama.cpp, src/models/*.cpp, src/llama-model.cpp and src/llama-context.cpp (what a key
means); conversion/*.py and gguf-py, constants.py and tensor_mapping.py (what converters write).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from neurojax.config import ModelConfig, RopeScaling
from neurojax.files.names.architecture import (
  Demand,
  Fault,
  Interpretation,
  at_layer,
  file_shape,
  of_config,
  short,
  tensor_demands,
  tensor_faults,
)
from neurojax.files.names.gguf_architectures import ARCHITECTURES, Architecture
from neurojax.files.names.gguf_layers import Facts
from neurojax.files.tensor_info import TensorInfo

Floats = Callable[[str], np.ndarray]
"""Reads a small tensor of a file by the file's name. Raises ValueError or NotImplementedError."""


_ROPE_KEYS = (
  "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
  "rope.scaling.original_context_length", "rope.scaling.finetuned",
  "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor",
  "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
)  # fmt: skip

# Keys outside the architecture's own namespace that change what a file means: (key, values under
# which it changes nothing, what to do).
_GENERAL_NEUTRAL: tuple[tuple[str, tuple[object, ...], str], ...] = (
  ("general.type", ("model",), "adapters and projectors are not models"),
  ("general.quantization_version", (0, 2), "quantize it again with a current llama.cpp"),
  ("split.count", (0, 1), "join the parts first: llama-gguf-split --merge"),
)

# A namespace that says: products need their activations rotated first (PrismML's llama.cpp).
_ROTATED = "prism.hadamard."
ACTIVATIONS = "neurojax.activations"
"""The key of a file that says what its model was trained to round activations to: "int8"."""
FACTORS = "rope_freqs.weight"
"""The tensor of rotary factors, one for each pair of a head."""

# The factor of a pair that does not turn.
_STILL = 1e30

# Why a tensor has no canonical name, by what its name contains; the first match counts.
_UNMAPPED: tuple[tuple[str, str], ...] = (
  ("rope_freqs.", "rotary factors per dimension"),
  ("rope_factors_", "rotary factors per dimension that depend on the length (longrope)"),
  ("attn_q_norm.", "normalised queries"),
  ("attn_k_norm.", "normalised keys"),
  ("per_layer_", "embeddings of each layer"),
  (".bias", "biases"),
  (".scale", "scales beside the weights"),
  ("_exps.", "a mixture of experts"),
  ("_shexp.", "experts that every token passes"),
  ("ffn_gate_inp", "a mixture of experts"),
  ("shortconv.", "convolutions"),
  ("_norm.", "a further normalisation"),
  (".lora_", "a LoRA adapter"),
)


def interpret(
  metadata: Mapping[str, object],
  tensors: Mapping[str, TensorInfo],
  floats: Floats | None = None,
) -> Interpretation:
  """Map a GGUF file's own words to a ModelConfig and canonical names. Never raises: see the lists
  of the result.

  Args:
    floats: Reads rotary factors, where the file has a tensor of them; None: such a file is refused.
  """
  demands = []
  for key, neutral, remedy in _GENERAL_NEUTRAL:
    if metadata.get(key, neutral[0]) not in neutral:
      demands.append(f"{key} = {short(metadata[key])}: {remedy}")
  if rotated := [key for key in metadata if key.startswith(_ROTATED)]:
    demands.append(f"{rotated[0]}: its weights are folded into a Hadamard rotation of activations")
  activations = metadata.get(ACTIVATIONS)
  if activations not in (None, "int8"):
    demands.append(f"{ACTIVATIONS} = {short(activations)}: int8 is computed")
  name = metadata.get("general.architecture")
  if not isinstance(name, str):
    fault = f"general.architecture = {short(name)}: it must be a string"
    return Interpretation(
      architecture=None, config=None, tensors={}, demands=tuple(demands), faults=(fault,)
    )
  arch = ARCHITECTURES.get(name)
  if arch is None:
    demands.append(
      f"architecture {short(name)}; the known ones are {', '.join(sorted(ARCHITECTURES))}"
    )
    return Interpretation(architecture=name, config=None, tensors={}, demands=tuple(demands))
  stored = dict(arch.tensors)
  if "head_DV" in stored and stored["head_DV"].name not in tensors:
    del stored["head_DV"]

  config, faults, more = _config(arch, name, metadata, tensors, floats)
  stored = of_config(stored, config)
  demands += more
  demands += _key_demands(arch, name, metadata, config)
  known = {*tensors} - {FACTORS} if floats is not None else tensors
  demands += tensor_demands(stored.values(), known, _UNMAPPED)
  if config is not None and not faults:
    placed = {key: info for key, info in tensors.items() if key != FACTORS}
    faults += tensor_faults(stored, placed, config)
  return Interpretation(
    architecture=name,
    config=config,
    tensors=stored,
    demands=tuple(demands),
    faults=tuple(faults),
    activations="int8" if activations == "int8" else None,
  )


def architecture_of(config: ModelConfig, *, as_it_is: bool = False) -> str:
  """The first architecture under which a GGUF file says all of a configuration.

  Args:
    as_it_is: The order of a head's elements too, which whoever writes a file can change.
  Raises: ValueError: there is none.
  """
  lacking, other = [], []
  # Files with biases are those of Qwen 2, though a llama may have them too.
  for name in sorted(ARCHITECTURES, key=lambda name: config.qkv_bias and name == "llama"):
    arch = ARCHITECTURES[name]
    if as_it_is and arch.rope_style != config.rope_style:
      lacking.append(f"{name} has rope_style = {arch.rope_style!r}")
      continue
    own = dataclasses.replace(in_words(config), rope_style=arch.rope_style)
    try:
      tensors = {
        one.name: TensorInfo(one.name, "F32", file_shape(one.axes, own, layer), 0, 0)
        for _, layer, one in arch.places(own)
      }
      said = {"general.architecture": name, **arch.metadata(name, own)}
    except ValueError as error:
      lacking.append(f"{name}: {error}")
      continue
    factors = np.array(rope_factors(own))
    if factors.size:
      tensors[FACTORS] = TensorInfo(FACTORS, "F32", factors.shape, 0, 0)
    found = interpret(said, tensors, lambda _, factors=factors: factors).config
    if found == own:
      return name
    fields = [
      field.name
      for field in dataclasses.fields(own)
      if found is not None and getattr(found, field.name) != getattr(own, field.name)
    ]
    other.append(f"{name} has another {' and '.join(fields) or 'form'}")
  raise ValueError(f"no architecture of GGUF holds this model: {'; '.join(other or lacking)}")


def rope_factors(config: ModelConfig) -> tuple[float, ...]:
  """The numbers of the tensor `FACTORS` for a configuration; empty where there is no such tensor."""
  for kind in config.kinds:
    scaling = kind.rope_scaling
    if scaling is None or kind.head_dim is None or kind.rope_base is None:
      continue
    if scaling.kind == "factors":
      return scaling.factors
    pairs = kind.head_dim // 2
    if scaling.kind == "proportional":
      turning = int(scaling.rotated * pairs)
      return (1.0,) * turning + (_STILL,) * (pairs - turning)
    if scaling.kind == "llama3":
      return _llama3_factors(scaling, kind.rope_base, pairs)
  return ()


def in_words(config: ModelConfig) -> ModelConfig:
  """A configuration as a GGUF file of it is read: Llama 3's scaling as the factors that it comes to."""
  scaling = config.rope_scaling
  if scaling is None or scaling.kind != "llama3":
    return config
  factors = RopeScaling(kind="factors", factors=rope_factors(config))
  return dataclasses.replace(config, rope_scaling=factors)


def _llama3_factors(scaling: RopeScaling, base: float, pairs: int) -> tuple[float, ...]:
  """conversion/llama.py, `generate_extra_tensors`, rounded to float32 as there."""
  assert scaling.original_context_length is not None
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  wavelengths = 2 * math.pi * base ** (np.arange(pairs) / pairs)
  turns = scaling.original_context_length / wavelengths
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  return tuple(float(f) for f in (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32))


def _config(
  arch: Architecture,
  name: str,
  metadata: Mapping[str, object],
  tensors: Mapping[str, TensorInfo],
  floats: Floats | None,
) -> tuple[ModelConfig | None, list[str], list[str]]:
  """The configuration if it makes sense, faults, and demands of its numbers."""
  values: dict[str, object] = dict(arch.defaults)
  faults: list[str] = []
  for field, suffix in arch.keys.items():
    key = f"{name}.{suffix}"
    if key not in metadata:
      continue
    value = uniform(metadata[key])
    if isinstance(value, list) and field == "num_kv_heads" and arch.layers.takes_kv_heads:
      values[field] = value
    elif isinstance(value, bool) or not isinstance(value, int | float):
      faults.append(f"{key} = {short(value)}: expected one number")
    elif field in ("rope_base", "norm_eps"):
      values[field] = float(value)
    elif field == "logit_softcap":
      values[field] = float(value) or None
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
    return None, faults, []

  def get(suffix: str, default: object = None) -> object:
    return uniform(metadata.get(f"{name}.{suffix}", default))

  values |= {
    "rope_style": arch.rope_style,
    "tied_embedding": "head_DV" not in arch.tensors or arch.tensors["head_DV"].name not in tensors,
    "qk_norm": "q_norm_H" in arch.tensors,
    "sub_norm": "ffn_sub_norm_F" in arch.tensors,
    "post_norm": "ffn_post_norm_D" in arch.tensors,
    "qkv_bias": "q_bias_NH" in arch.tensors
    and at_layer(arch.tensors["q_bias_NH"].name, 0) in tensors,
    "layer_scale": "layer_scale_1" in arch.tensors
    and at_layer(arch.tensors["layer_scale_1"].name, 0) in tensors,
  }
  values |= {k: v(values) if callable(v) else v for k, v in arch.fixed.items()}
  try:
    scaling = _rope_scaling(name, get, values, tensors, floats)
    facts = Facts(name=name, get=get, values=values, tensors=tensors, scaling=scaling)
    values |= arch.layers.read(facts)
    return ModelConfig(**values), [], []  # type: ignore[arg-type]
  except Demand as demand:
    return _as_stated(values), [], [str(demand)]
  except (Fault, ValueError) as error:
    return None, [str(error)], []


def _as_stated(values: Mapping[str, object]) -> ModelConfig | None:
  """The numbers of a refused file, where they make a model without what is refused."""
  try:
    return ModelConfig(**values)  # type: ignore[arg-type]
  except (ValueError, TypeError):
    return None


def _rope_scaling(
  name: str,
  get: Callable[..., object],
  values: Mapping[str, object],
  tensors: Mapping[str, TensorInfo],
  floats: Floats | None,
) -> RopeScaling | None:
  """llama.cpp: llama-context.cpp for what each key does, ops.cpp `rope_yarn`."""

  def number(suffix: str, default: float) -> float:
    value = get(suffix, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
      raise Fault(f"{name}.{suffix} = {short(value)}: expected one number")
    return value

  kind = get("rope.scaling.type", "linear")
  factor = number("rope.scaling.factor", 0) or number("rope.scale_linear", 0) or 1.0
  attention = number("rope.scaling.attn_factor", 1.0) or 1.0
  if kind not in ("none", "linear", "yarn"):
    raise Demand(f"{name}.rope.scaling.type = {short(kind)}")
  if kind != "yarn" and attention != 1:
    raise Demand(f"{name}.rope.scaling.attn_factor = {attention} without yarn")
  if number("rope.scaling.yarn_log_multiplier", 0) != 0:
    raise Demand(
      f"{name}.rope.scaling.yarn_log_multiplier = {get('rope.scaling.yarn_log_multiplier')}"
    )
  factors = _factors(values, tensors, floats)
  if kind == "yarn":
    if number("rope.scaling.yarn_ext_factor", 1) not in (-1, 1):
      raise Demand(f"{name}.rope.scaling.yarn_ext_factor = {get('rope.scaling.yarn_ext_factor')}")
    if factors:
      raise Demand(f"tensor {FACTORS!r} beside yarn")
    default = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    # llama.cpp takes no notice of it; transformers, from which converters copy it, multiplies by it.
    said = number("rope.scaling.yarn_attn_factor", 1)
    if said != 1 and abs(said - default) > 1e-4:
      raise Demand(f"{name}.rope.scaling.yarn_attn_factor = {said}, not 0.1 ln(factor) + 1")
    if factor == 1 and attention == 1:
      return None
    original = get("rope.scaling.original_context_length", values["context_length"])
    return RopeScaling(
      kind="yarn",
      factor=float(factor),
      original_context_length=original,  # type: ignore[arg-type]
      beta_fast=float(number("rope.scaling.yarn_beta_fast", 32)),
      beta_slow=float(number("rope.scaling.yarn_beta_slow", 1)),
      attention_factor=None if attention == 1 else attention * default,
    )
  factor = 1.0 if kind == "none" else float(factor)
  if factors:
    return RopeScaling(kind="factors", factor=factor, factors=factors)
  return None if factor == 1 else RopeScaling(kind="linear", factor=factor)


def _factors(
  values: Mapping[str, object], tensors: Mapping[str, TensorInfo], floats: Floats | None
) -> tuple[float, ...]:
  if FACTORS not in tensors or floats is None:
    return ()
  shape = tensors[FACTORS].shape
  if len(shape) != 1 or shape[0] > 65_536:
    raise Fault(f"tensor {FACTORS!r} has the shape {shape}: it must have one axis")
  try:
    factors = tuple(float(value) for value in floats(FACTORS))
  except NotImplementedError as error:
    raise Demand(str(error)) from error
  return () if all(value == 1 for value in factors) else factors


def _key_demands(
  arch: Architecture, name: str, metadata: Mapping[str, object], config: ModelConfig | None
) -> Iterator[str]:
  known = {*arch.keys.values(), *_ROPE_KEYS, *arch.layers.keys}
  for key in metadata:
    if not key.startswith(f"{name}."):
      continue
    suffix = key.removeprefix(f"{name}.")
    if suffix in known:
      continue
    value = uniform(metadata[key])
    if suffix in arch.same_as:
      field = arch.same_as[suffix]
      if config is not None and value != getattr(config, field):
        yield f"{key} = {short(value)} differs from {field} = {getattr(config, field)}"
    elif suffix not in arch.neutral:
      yield f"{key} = {short(value)}: the {name} reader does not know this key"
    else:
      neutral = arch.neutral[suffix]
      if neutral is not None and value not in neutral:
        yield f"{key} = {short(value)}"


def uniform(value: object) -> object:
  """A list that repeats one number (a value per layer) as that number."""
  if isinstance(value, list) and value and isinstance(value[0], int | float):
    return value[0] if all(item == value[0] for item in value) else value
  return value

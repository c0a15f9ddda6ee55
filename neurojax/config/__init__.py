"""Every configuration as a frozen dataclass, with strict TOML in and out."""

from neurojax.config.layers import LayerKind, Mixer, RopeKind, RopeScaling
from neurojax.config.model import Activation, ModelConfig, RopeStyle, architectures
from neurojax.config.sampling import Sampling
from neurojax.config.serving import (
  DEFAULT_CONTEXT,
  DEFAULT_PREFIX,
  MOST_CONTEXT,
  MOST_SEQUENCES,
  Activations,
  CacheForm,
  Dtype,
  Programs,
  Serving,
  Speculate,
)
from neurojax.config.span import Span
from neurojax.config.toml import from_dict, from_toml, named_configs, to_toml

__all__ = [
  "DEFAULT_CONTEXT",
  "DEFAULT_PREFIX",
  "MOST_CONTEXT",
  "MOST_SEQUENCES",
  "Activation",
  "Activations",
  "CacheForm",
  "Dtype",
  "LayerKind",
  "Mixer",
  "ModelConfig",
  "Programs",
  "RopeKind",
  "RopeScaling",
  "RopeStyle",
  "Sampling",
  "Serving",
  "Span",
  "Speculate",
  "architectures",
  "from_dict",
  "from_toml",
  "named_configs",
  "to_toml",
]

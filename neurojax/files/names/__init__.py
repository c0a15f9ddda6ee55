"""What each format and architecture calls its tensors and its numbers, and what the model refuses."""

from neurojax.files.names.architecture import (
  PER_LAYER,
  WHOLE_MODEL,
  Interpretation,
  Stored,
  file_shape,
  layer_names,
  locate,
  template_of,
  to_canonical,
)
from neurojax.files.names.families import FAMILIES as HUGGINGFACE
from neurojax.files.names.gguf import (
  FACTORS,
  architecture_of,
  in_words,
  interpret,
  rope_factors,
)
from neurojax.files.names.gguf_architectures import ARCHITECTURES, Architecture
from neurojax.files.names.huggingface import interpret as interpret_huggingface
from neurojax.files.names.llama2c import LLAMA2C

__all__ = [
  "ARCHITECTURES",
  "FACTORS",
  "HUGGINGFACE",
  "LLAMA2C",
  "PER_LAYER",
  "WHOLE_MODEL",
  "Architecture",
  "Interpretation",
  "Stored",
  "architecture_of",
  "file_shape",
  "in_words",
  "interpret",
  "interpret_huggingface",
  "layer_names",
  "locate",
  "rope_factors",
  "template_of",
  "to_canonical",
]

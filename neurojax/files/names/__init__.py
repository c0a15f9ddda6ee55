"""The names that formats and families have for tensors and numbers, and what is refused."""

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
from neurojax.files.names.folder import ACTIVATIONS as FOLDER_ACTIVATIONS
from neurojax.files.names.folder import interpret as interpret_folder
from neurojax.files.names.folder_families import FAMILIES as FOLDER_FAMILIES
from neurojax.files.names.gguf import (
  ACTIVATIONS,
  FACTORS,
  architecture_of,
  in_words,
  rope_factors,
)
from neurojax.files.names.gguf import interpret as interpret_gguf
from neurojax.files.names.gguf_architectures import ARCHITECTURES, Architecture
from neurojax.files.names.llama2c import LLAMA2C

__all__ = [
  "ACTIVATIONS",
  "ARCHITECTURES",
  "FACTORS",
  "FOLDER_ACTIVATIONS",
  "FOLDER_FAMILIES",
  "LLAMA2C",
  "PER_LAYER",
  "WHOLE_MODEL",
  "Architecture",
  "Interpretation",
  "Stored",
  "architecture_of",
  "file_shape",
  "in_words",
  "interpret_folder",
  "interpret_gguf",
  "layer_names",
  "locate",
  "rope_factors",
  "template_of",
  "to_canonical",
]

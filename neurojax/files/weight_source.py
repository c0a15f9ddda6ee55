"""The reading half of a model file, which writers take: a file on disk, or a training run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from neurojax.config import ModelConfig
from neurojax.files.names.architecture import Activations
from neurojax.files.tensor_info import TensorInfo
from neurojax.forms import Form
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec


class WeightSource(Protocol):
  """A whole model whose tensors are read one at a time, by canonical name.

  A canonical name ends in the letters of its axes, see `files.names.architecture`.

  Attributes:
    path: The file or folder that errors name.
    format: "gguf", "llama2c", "huggingface" (a folder), or "run" (a training run).
    metadata: What the source says about itself, under its own keys, as plain Python values.
  """

  path: Path
  format: str
  metadata: Mapping[str, object]

  @property
  def config(self) -> ModelConfig:
    """The architecture.

    Raises:
      NotImplementedError: the source asks for something that the model does not compute; the message
        names all of it.
      ValueError: the source contradicts itself or lacks something.
    """
    ...

  @property
  def tokenizer(self) -> TokenizerSpec | None:
    """The vocabulary, or None where there is none. Raises like `config`."""
    ...

  @property
  def activations(self) -> Activations | None:
    """What the model was trained to round its activations to, or None where the source does not say."""
    ...

  @property
  def card(self) -> Mapping[str, str]:
    """What the source says about its model, under GGUF's keys ("general.name", "general.license")."""
    ...

  def info(self, name: str, layer: int | None = None) -> TensorInfo:
    """The stored tensor behind a canonical name. Raises like `read`."""
    ...

  def read(self, name: str, layer: int | None = None) -> np.ndarray:
    """Float32 values of a canonical name ("q_DNH"), axes in the order of its letters.

    The array owns its memory; its strides are those of the source's axis order.

    Args:
      name: One of `names.WHOLE_MODEL` (layer must be None) or `names.PER_LAYER` (layer required).
    Raises:
      ValueError: no such name, a layer out of range, `head_DV` of a tied model.
      NotImplementedError: the stored type has no decoder here, or as `config`.
    """
    ...

  def read_ternary(
    self, name: str, layer: int | None = None
  ) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Codes, scales and group size of a ternary matrix, in the layout of `weights.ternary.TernaryArray`.

    A row is an output channel, or an entry of the vocabulary; rows of experts follow each other.
    Scales keep the source's bits. Where the group size is None there is one scale for the matrix, or
    one for each expert, in rows of one.

    Raises: ValueError: the stored type is not ternary, or the data are damaged; and like `read`.
    """
    ...

  def narrow_form(self, name: str, layer: int | None = None) -> Form | None:
    """The form that keeps a tensor's numbers exactly in the width of the source; None if `read` is it.

    `read_ternary` reads tensors of the form `Scales`, `read_plain` those of the form `Plain`, and
    `ModelFile.read_grouped` those of the form `Grouped`. Raises like `read`.
    """
    ...

  def read_plain(self, name: str, layer: int | None = None) -> np.ndarray:
    """The values that `read` gives, in the source's own dtype.

    Raises: ValueError: the tensor does not hold plain numbers; and like `read`.
    """
    ...

  def check(self) -> None:
    """Raises NotImplementedError or ValueError unless every tensor could be read."""
    ...

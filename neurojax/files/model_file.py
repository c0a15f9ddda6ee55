"""A model file of any format, as its reader presents it."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from neurojax.config import ModelConfig
from neurojax.files.tensor_info import TensorInfo
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

if TYPE_CHECKING:
  from neurojax.files.names import Interpretation
  from neurojax.forms import Form
  from neurojax.weights.rows import GroupedRows


class ModelFile(Protocol):
  """A model file. Listing works on every intact file; `config` and `read` refuse by name what the
  model does not compute yet.

  Attributes:
    path: The file, or the folder.
    format: "gguf", "llama2c" or "huggingface".
    version: Of the format, as the file states it; of transformers, for a folder.
    file_bytes: Of the file, or of a folder's weights.
    metadata: What the file says about itself, under its own keys, as plain Python values.
    tensors: Its tensors under its own names, in file order.
    interpretation: What the reader makes of it: architecture, config, and reasons to refuse.
  """

  path: Path
  format: str
  version: int | str
  file_bytes: int
  metadata: Mapping[str, object]
  tensors: Mapping[str, TensorInfo]
  interpretation: "Interpretation"

  @property
  def config(self) -> ModelConfig:
    """The architecture.

    Raises:
      NotImplementedError: the file asks for something the model does not compute; all of it named.
      ValueError: the file contradicts itself or lacks something.
    """
    ...

  @property
  def tokenizer(self) -> TokenizerSpec | None:
    """The vocabulary, or None where the file has none. Raises like `config`."""
    ...

  def info(self, name: str, layer: int | None = None) -> TensorInfo:
    """The stored tensor behind a canonical name. Raises like `read`."""
    ...

  def read(self, name: str, layer: int | None = None) -> np.ndarray:
    """Float32 values of a canonical name ("q_DNH"), axes in the order of its letters.

    The array owns its memory; its strides are those of the file's axis order.

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
    """Codes, scales and group size of a ternary matrix, as `weights.ternary.TernaryArray` has them.

    A row is an output channel, or an entry of the vocabulary; those of experts stand one after the
    other. Scales keep the file's bits; where the group size is None there is one, or one for each
    expert, in rows of one.

    Raises: ValueError: the stored type is not ternary, or the data are damaged; and like `read`.
    """
    ...

  def narrow_form(self, name: str, layer: int | None = None) -> "Form | None":
    """What keeps a canonical name's numbers in the width of the file: `read_ternary` reads those of a
    form `Scales`, `read_grouped` those of `Grouped`, `read_plain` those of `Plain`. None: nothing that
    is narrower than `read`. Raises like `read`."""
    ...

  def read_grouped(self, name: str, layer: int | None = None) -> "GroupedRows":
    """The numbers and scales of a quantized matrix: a row is an output channel, or an entry of the
    vocabulary; those of experts stand one after the other. Raises: ValueError: no such form, a scale that is not finite; and like `read`."""
    ...

  def read_plain(self, name: str, layer: int | None = None) -> np.ndarray:
    """As `read`, in the file's own dtype. Raises: ValueError: no plain numbers; and like `read`."""
    ...

  def stored_bytes(self, name: str, layer: int | None = None) -> np.ndarray:
    """The undecoded bytes of a canonical name: uint8, one axis, a read-only view of the file."""
    ...

  def problems(self) -> list[str]:
    """Every reason why this file cannot be run from end to end; empty when it can."""
    ...

  def check(self) -> None:
    """Raises NotImplementedError or ValueError unless every tensor could be read."""
    ...

  def check_unchanged(self) -> None:
    """Raises ValueError if the file was replaced, changed or removed since it was opened."""
    ...

  def sha256(self) -> str:
    """Hex digest of the whole file (cached per user)."""
    ...

  def close(self) -> None: ...

  def __enter__(self) -> Self: ...

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None: ...

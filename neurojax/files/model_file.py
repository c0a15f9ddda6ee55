"""The face of a model file of any format, as its reader presents it."""

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from neurojax.files.names.architecture import Interpretation
from neurojax.files.tensor_info import TensorInfo
from neurojax.files.weight_source import WeightSource
from neurojax.weights.rows import GroupedRows


class ModelFile(WeightSource, Protocol):
  """An open model file. Every intact file can be listed; `config` and `read` refuse by name what the
  model does not compute.

  Attributes:
    version: The version of the format that the file states; for a folder, the version of transformers.
    file_bytes: Bytes of the file, or of a folder's weights.
    tensors: Every tensor under the file's own name, in file order.
    interpretation: The architecture, the config, and the reasons to refuse that the reader found.
  """

  version: int | str
  file_bytes: int
  tensors: Mapping[str, TensorInfo]
  interpretation: Interpretation

  def read_grouped(self, name: str, layer: int | None = None) -> GroupedRows:
    """The integers and scales of a quantized matrix. A row is an output channel, or an entry of the
    vocabulary; rows of experts follow each other.

    Raises: ValueError: the tensor has no such form, or a scale is not finite; and like `read`.
    """
    ...

  def stored_bytes(self, name: str, layer: int | None = None) -> np.ndarray:
    """The undecoded bytes of a canonical name: uint8, one axis, a read-only view of the file."""
    ...

  def problems(self) -> list[str]:
    """Every reason why this file cannot be run from end to end; empty when it can."""
    ...

  def check_unchanged(self) -> None:
    """Raises ValueError if the file was replaced, changed or removed since it was opened."""
    ...

  def sha256(self) -> str:
    """The hex digest of the whole file, cached for each user."""
    ...

  def close(self) -> None: ...

  def __enter__(self) -> Self: ...

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None: ...

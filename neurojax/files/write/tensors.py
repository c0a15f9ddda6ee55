"""One tensor at a time out of a model file, in the order of rows that another format wants."""

import dataclasses
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from jaxtyping import Float32

from neurojax.config import ModelConfig, RopeStyle
from neurojax.files import names
from neurojax.files.model_file import ModelFile
from neurojax.files.names import Stored
from neurojax.forms import Plain, Scales

DTYPES = {
  "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip

_TURNED = ("q_DNH", "k_DKH", "q_bias_NH", "k_bias_KH", "q_norm_H", "k_norm_H")
"""What is multiplied by rotary positions, in the order of a head's elements."""


@dataclasses.dataclass(frozen=True)
class Place:
  """A tensor of a file to be written.

  Attributes:
    name, layer: Its canonical name.
    stored: Where the new file keeps it, the layer filled in.
    expert: Which of them, where each has a tensor of its own.
  """

  name: str
  layer: int | None
  stored: Stored
  expert: int | None = None

  @property
  def file_name(self) -> str:
    name = self.stored.name
    return name if self.expert is None else name.replace("{expert}", str(self.expert))

  @property
  def axes(self) -> str:
    axes = self.stored.axes
    return axes if self.expert is None else axes.partition(" ")[2]

  def shape(self, config: ModelConfig) -> tuple[int, ...]:
    return names.file_shape(self.axes, config, self.layer)


def numbers(file: ModelFile, place: Place, rope_style: RopeStyle) -> np.ndarray:
  """The numbers of a tensor in the order and shape of the new file, in their own dtype if that is one of
  `DTYPES`, else float32.

  Raises: ValueError: it holds NaN or infinity; and what the file's reader raises.
  """
  if place.stored.shift == 0 and isinstance(file.narrow_form(place.name, place.layer), Plain):
    values = file.read_plain(place.name, place.layer)
  else:
    values = file.read(place.name, place.layer)
  if not np.isfinite(values).all():
    raise ValueError(
      f"{file.path}: {place.file_name} would hold NaN or infinity: the file is damaged, get it again"
    )
  if place.stored.shift:
    values = values - np.float32(place.stored.shift)
  config = file.config
  if place.name in _TURNED and config.rope_style != rope_style:
    values = np.take(values, _order(config, place.layer), axis=-1)
  letters = place.name.rpartition("_")[2]
  if place.expert is not None:
    values, letters = values[place.expert], letters.replace("E", "", 1)
  order = [letters.index(one) for one in place.axes.replace(" ", "") if one in letters]
  return np.ascontiguousarray(values.transpose(order)).reshape(place.shape(config))


def ternary_rows(
  file: ModelFile, place: Place, rope_style: RopeStyle
) -> tuple[np.ndarray, np.ndarray, int | None]:
  """Codes, scales and group size of a ternary matrix, its rows in the order of the new file."""
  codes, scales, group_size = file.read_ternary(place.name, place.layer)
  config = file.config
  if place.name in _TURNED and config.rope_style != rope_style:
    order_H = _order(config, place.layer)
    heads = len(codes) // len(order_H)
    rows = (np.arange(heads)[:, None] * len(order_H) + order_H[None]).ravel()
    codes = codes[rows]
    scales = scales if group_size is None else scales[rows]
  return codes, scales, group_size


def is_ternary(file: ModelFile, place: Place) -> bool:
  return place.expert is None and isinstance(file.narrow_form(place.name, place.layer), Scales)


def narrowest(values: np.ndarray) -> str:
  """The first of BF16, F16 and F32 that holds numbers without any change: their own if it is one of
  the first two."""
  for kind in ("BF16", "F16"):
    if values.dtype == DTYPES[kind] or holds(values, kind):
      return kind
  return "F32"


def holds(values: np.ndarray, kind: str) -> bool:
  exact = values.astype(np.float32, copy=False)
  with np.errstate(over="ignore"):
    return bool((exact.astype(DTYPES[kind]).astype(np.float32) == exact).all())


@dataclasses.dataclass
class Loss:
  """What a conversion changed, over all numbers of the tensors that it rounded."""

  squares: float = 0.0
  off: float = 0.0
  worst: float = 0.0
  worst_name: str = ""
  tensors: int = 0

  def add(
    self, name: str, old: Float32[np.ndarray, "..."], new: Float32[np.ndarray, "..."]
  ) -> None:
    squares = float(np.square(old, dtype=np.float64).sum())
    off = float(np.square(old.astype(np.float64) - new).sum())
    if off == 0:
      return
    relative = (off / squares) ** 0.5 if squares else np.inf
    self.squares, self.off, self.tensors = self.squares + squares, self.off + off, self.tensors + 1
    if relative > self.worst:
      self.worst, self.worst_name = relative, name

  @property
  def relative(self) -> float:
    """Root mean square of the changes, by that of the numbers."""
    return (self.off / self.squares) ** 0.5 if self.off else 0.0

  def __str__(self) -> str:
    if not self.tensors:
      return "no number changed"
    return (
      f"{self.tensors} tensors rounded, by {self.relative:.2%} of their root mean square (most:"
      f" {self.worst:.2%}, {self.worst_name})"
    )


def places(stored: Iterator[tuple[str, int | None, Stored]], num_experts: int) -> Iterator[Place]:
  """The tensors of a file whose format says where it keeps what."""
  for name, layer, one in stored:
    if one.is_split:
      yield from (Place(name, layer, one, expert) for expert in range(num_experts))
    else:
      yield Place(name, layer, one)


def _order(config: ModelConfig, layer: int | None) -> np.ndarray:
  """Where the elements of a head come from: pairs (i, i + H/2) to (2i, 2i + 1), or back."""
  h = config.sizes(layer)["H"]
  rows = (2, h // 2) if config.rope_style == "half" else (h // 2, 2)
  return np.arange(h).reshape(rows).T.ravel()

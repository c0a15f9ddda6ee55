"""Reads one tensor at a time from a source, in the order of rows that the new file wants."""

import dataclasses
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from neurojax.config import ModelConfig, RopeStyle
from neurojax.files import names
from neurojax.files.names import Stored
from neurojax.files.weight_source import WeightSource
from neurojax.forms import Plain, Scales

DTYPES = {
  "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip

# Numbers whose squares are summed at a time.
_CHUNK_ELEMENTS = 1 << 20

_TURNED = ("q_DNH", "k_DKH", "q_bias_NH", "k_bias_KH", "q_norm_H", "k_norm_H")
"""Tensors whose head elements stand in the order of rotary pairs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
  """A tensor of a file to be written.

  Attributes:
    name: The canonical name.
    layer: The layer, or None outside the layers.
    stored: Where the new file keeps the tensor, the layer filled in.
    expert: The expert's number, where each expert has a tensor of its own.
  """

  name: str
  layer: int | None
  stored: Stored
  expert: int | None = None

  @property
  def title(self) -> str:
    """The canonical name with its layer, for errors."""
    return self.name if self.layer is None else f"{self.name} of layer {self.layer}"

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


def numbers(source: WeightSource, place: Place, rope_style: RopeStyle) -> np.ndarray:
  """The numbers of a tensor in the order and shape of the new file.

  Returns: Their own dtype if it is one of `DTYPES`, else float32.
  Raises: ValueError: one is NaN or infinite; and what the source raises.
  """
  form = source.narrow_form(place.name, place.layer)
  if place.stored.shift == 0 and isinstance(form, Plain):
    values = source.read_plain(place.name, place.layer)
  else:
    values = source.read(place.name, place.layer)
  if place.stored.shift:
    values = values - np.float32(place.stored.shift)
  config = source.config
  if place.name in _TURNED and config.rope_style != rope_style:
    values = np.take(values, _order(config, place.layer), axis=-1)
  letters = place.name.rpartition("_")[2]
  if place.expert is not None:
    values, letters = values[place.expert], letters.replace("E", "", 1)
  order = [letters.index(one) for one in place.axes.replace(" ", "") if one in letters]
  values = np.ascontiguousarray(values.transpose(order)).reshape(place.shape(config))
  check_finite(values, f"{source.path}: {place.file_name}")
  return values


def check_finite(values: np.ndarray, where: str) -> None:
  """Raises: ValueError: a value is NaN or infinite; it names the first."""
  finite = np.isfinite(values)
  if not finite.all():
    first = tuple(int(i) for i in np.argwhere(~finite)[0])
    raise ValueError(
      f"{where}: the value at {list(first)} is {values[first]}, not a finite number: the file is"
      " damaged, get it again"
    )


def ternary_rows(
  source: WeightSource, place: Place, rope_style: RopeStyle
) -> tuple[np.ndarray, np.ndarray, int | None]:
  """Codes, scales and group size of a ternary matrix, its rows in the order of the new file."""
  codes, scales, group_size = source.read_ternary(place.name, place.layer)
  config = source.config
  if place.name in _TURNED and config.rope_style != rope_style:
    order_H = _order(config, place.layer)
    heads = len(codes) // len(order_H)
    rows = (np.arange(heads)[:, None] * len(order_H) + order_H[None]).ravel()
    codes = codes[rows]
    scales = scales if group_size is None else scales[rows]
  return codes, scales, group_size


def is_ternary(source: WeightSource, place: Place) -> bool:
  """Whether the source has ternary codes for a tensor of the new file."""
  return place.expert is None and isinstance(source.narrow_form(place.name, place.layer), Scales)


def rounded(values: np.ndarray, kind: str, where: str) -> np.ndarray:
  """Numbers in a type of `DTYPES`. Raises: ValueError: one is beyond the type's largest."""
  if values.dtype == DTYPES[kind]:
    return values
  with np.errstate(over="ignore"):
    made = values.astype(DTYPES[kind])
  if not np.isfinite(made).all():
    raise ValueError(f"{where}: a number is beyond {kind}: choose BF16 or F32")
  return made


def narrowest(values: np.ndarray) -> str:
  """The first of BF16, F16 and F32 that holds numbers without any change; their own type if they are
  BF16 or F16."""
  for kind in ("BF16", "F16"):
    if values.dtype == DTYPES[kind] or holds(values, kind):
      return kind
  return "F32"


def holds(values: np.ndarray, kind: str) -> bool:
  """Whether a type of `DTYPES` holds numbers without any change."""
  exact = values.astype(np.float32, copy=False)
  with np.errstate(over="ignore"):
    return bool((exact.astype(DTYPES[kind]).astype(np.float32) == exact).all())


@dataclasses.dataclass
class Loss:
  """The changes that a conversion made.

  Attributes:
    squares: The sum of squares of the numbers in rounded tensors.
    off: The sum of squares of the changes.
    worst: The largest relative change of a tensor (root mean squares).
    worst_name: The tensor with that change.
    tensors: The number of rounded tensors.
  """

  squares: float = 0.0
  off: float = 0.0
  worst: float = 0.0
  worst_name: str = ""
  tensors: int = 0

  def add(self, name: str, old: np.ndarray, new: np.ndarray) -> None:
    """Count a tensor: its numbers before and after, of one shape, in any dtypes."""
    squares = off = 0.0
    if old is not new:
      old, new = old.reshape(-1), new.reshape(-1)
      for first in range(0, old.size, _CHUNK_ELEMENTS):
        chunk = slice(first, first + _CHUNK_ELEMENTS)
        exact = old[chunk].astype(np.float64)
        squares += float(np.square(exact).sum())
        off += float(np.square(exact - new[chunk].astype(np.float64)).sum())
    if off == 0:
      return
    relative = (off / squares) ** 0.5 if squares else np.inf
    self.squares, self.off, self.tensors = self.squares + squares, self.off + off, self.tensors + 1
    if relative > self.worst:
      self.worst, self.worst_name = relative, name

  @property
  def relative(self) -> float:
    """Root mean square of the changes, divided by that of the numbers."""
    return (self.off / self.squares) ** 0.5 if self.off else 0.0

  def __str__(self) -> str:
    if not self.tensors:
      return "no number changed"
    return (
      f"{self.tensors} tensors rounded, by {self.relative:.2%} of their root mean square (most:"
      f" {self.worst:.2%}, {self.worst_name})"
    )


def places(stored: Iterator[tuple[str, int | None, Stored]], num_experts: int) -> Iterator[Place]:
  """The tensors of a new file, from the tensors that its format has (canonical name, layer, stored)."""
  for name, layer, one in stored:
    if one.is_split:
      yield from (Place(name, layer, one, expert) for expert in range(num_experts))
    else:
      yield Place(name, layer, one)


@dataclasses.dataclass(frozen=True)
class Converted:
  """The file or folder that was written.

  Attributes:
    architecture: The architecture of the GGUF file, or the model_type of the folder.
    kind: The type of the ternary matrices; without any, the type of most matrices.
    types: The number of tensors of each type.
    loss: The changes by rounding.
    notes: Sentences that the user should read about the new file.
  """

  architecture: str
  kind: str
  types: dict[str, int]
  loss: Loss
  notes: tuple[str, ...] = ()


NO_LICENSE = (
  "the source names no licence, so the new file names none: give it with --license, if you know it"
)


def _order(config: ModelConfig, layer: int | None) -> np.ndarray:
  """The old place of each element of a head: pairs (i, i + H/2) go to (2i, 2i + 1), or back."""
  h = config.sizes(layer)["H"]
  rows = (2, h // 2) if config.rope_style == "half" else (h // 2, 2)
  return np.arange(h).reshape(rows).T.ravel()

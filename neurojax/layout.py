"""One way to shard inside a host, or over hosts of one kind: shape letter -> mesh axis."""

import dataclasses

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

BATCH = ("data", "fsdp")
"""Mesh axes that a batch is spread over, its first axis first."""

LETTERS = {"D": "fsdp", "F": "tensor", "N": "tensor", "K": "tensor", "V": "tensor"}
"""Mesh axis of each letter of a matrix; letters that are not here stay whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """How many devices each axis of the mesh has. The mesh is explicit always: one device is 1 x 1 x 1.

  Attributes:
    data: Batches are spread, parameters repeated.
    fsdp: Batches are spread, and parameters too, along D; a layer's are gathered when it runs
      (arXiv:1910.02054, stage 3).
    tensor: Heads, the FFN's width and the vocabulary are spread (arXiv:1909.08053).
  """

  data: int = 1
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self) -> None:
    for axis in AXES:
      size = getattr(self, axis)
      if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"layout.{axis} = {size!r}: it must be a positive integer")

  @property
  def devices(self) -> int:
    return self.data * self.fsdp * self.tensor

  @property
  def batch_shards(self) -> int:
    """Parts that a batch is cut into."""
    return self.data * self.fsdp

  def mesh(self, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh, over all devices of all processes unless some are given.

    Raises: ValueError: their number is another one than the layout's.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) != self.devices:
      raise ValueError(
        f"layout data {self.data} x fsdp {self.fsdp} x tensor {self.tensor} = {self.devices}"
        f" devices, and there are {len(devices)}: change one of the three"
      )
    shape = tuple(getattr(self, axis) for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)

  def check(self, sizes: dict[str, int], *, batch_size: int) -> None:
    """Raises: ValueError: a letter's size, or the batch, is no multiple of its axes."""
    for letter, axis in LETTERS.items():
      if sizes[letter] % getattr(self, axis):
        raise ValueError(
          f"{letter} = {sizes[letter]} is no multiple of layout.{axis} = {getattr(self, axis)}:"
          f" {_WHAT[letter]} cannot be spread evenly"
        )
    if batch_size % self.batch_shards:
      raise ValueError(
        f"batch_size = {batch_size} is no multiple of layout.data x layout.fsdp ="
        f" {self.data} x {self.fsdp} = {self.batch_shards}"
      )


_WHAT = {
  "D": "the model's width",
  "F": "the FFN's width",
  "N": "query heads",
  "K": "key-value heads",
  "V": "the vocabulary",
}


def spec(letters: str, *, gathered: bool = False) -> PartitionSpec:
  """Where the axes of an array lie, one letter each.

  A matrix goes by `LETTERS`. A vector of any letter (a norm's scale, with or without L in front) is
  whole everywhere: it is small, and each device needs all of it.

  Args:
    letters: Of the array's axes, for example "LDF"; "B" is spread as batches are.
    gathered: A matrix as a layer multiplies by it, whole along D.
  """

  def axis(letter: str) -> str | tuple[str, ...] | None:
    if letter == "B":
      return BATCH
    name = LETTERS.get(letter)
    return None if gathered and name == "fsdp" else name

  return PartitionSpec(*map(axis, letters))


def sharding(mesh: Mesh, letters: str, *, gathered: bool = False) -> NamedSharding:
  return NamedSharding(mesh, spec(letters, gathered=gathered))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())

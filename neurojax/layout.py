"""Shards arrays inside a host, or over hosts of one kind: each shape letter has a mesh axis.

There is always a mesh, of 1 x 1 x 1 for one device. Its axes are of JAX's kind Auto: arrays enter and leave
programs with shardings, `lax.with_sharding_constraint` says where those in between lie, and XLA chooses
the rest.
"""

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
  """The number of devices on each axis of the mesh.

  Attributes:
    data: Devices that batches are spread over while parameters are repeated.
    fsdp: Devices that batches and parameters are spread over, parameters along D; those of a layer are
      gathered when it runs (arXiv:1910.02054, stage 3).
    tensor: Devices that heads, the FFN's width and the vocabulary are spread over (arXiv:1909.08053).
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
    """Number of parts that a batch is cut into."""
    return self.data * self.fsdp

  def mesh(self, devices: list[jax.Device] | None = None) -> Mesh:
    """Makes the mesh, over all devices of all processes unless some are given.

    Raises: ValueError: the number of devices is not the layout's.
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
    """Raises: ValueError: the size of a letter, or the batch, is no multiple of the axes it lies on."""
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
  """Returns the mesh axes of an array, given a letter for each of its axes.

  Args:
    letters: One for each axis, for example "LDF"; "B" is spread as batches are.
    gathered: Whether the array is whole along D, as a layer multiplies by it.
  """

  def axis(letter: str) -> str | tuple[str, ...] | None:
    if letter == "B":
      return BATCH
    name = LETTERS.get(letter)
    return None if gathered and name == "fsdp" else name

  return PartitionSpec(*map(axis, letters))


def sharding(mesh: Mesh, letters: str, *, gathered: bool = False) -> NamedSharding:
  """Places an array on a mesh, see `spec`."""
  return NamedSharding(mesh, spec(letters, gathered=gathered))


def replicated(mesh: Mesh) -> NamedSharding:
  """Repeats an array on every device."""
  return NamedSharding(mesh, PartitionSpec())

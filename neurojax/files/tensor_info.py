"""The entry of one tensor in a model file."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """One tensor as the file lists it.

  Attributes:
    name: The file's own name.
    type: The element type as ggml spells it ("Q4_1"), with the group where two share a number
      ("Q2_0 (group 128)"); "unknown(57)" for an id nobody documents.
    shape: Row-major: the last axis is contiguous.
    offset: Bytes from the start of the file to the data.
    nbytes: Bytes of the data. For a type whose block size the reader does not know: everything up to
      the next tensor or the end of the file, padding included.
  """

  name: str
  type: str
  shape: tuple[int, ...]
  offset: int
  nbytes: int

"""Arrays come back from messages to the bit, and messages that lie are refused."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurojax.wire import tensor
from neurojax.wire import wire_pb2 as pb

DTYPES = [np.int32, np.float32, np.float16, ml_dtypes.bfloat16]


@given(
  dtype=st.sampled_from(DTYPES),
  rows=st.integers(0, 9),
  width=st.integers(1, 9),
  seed=st.integers(0, 99),
)
def test_tensors_travel_bit_by_bit(dtype, rows: int, width: int, seed: int):
  rng = np.random.default_rng(seed)
  values = rng.integers(0, 256, (rows, width * 4), np.uint8).view(np.uint8)
  values = np.ascontiguousarray(values[:, : width * np.dtype(dtype).itemsize]).view(dtype)
  sent = pb.Tensor.FromString(tensor.encode(values).SerializeToString())
  back = tensor.decode(sent, what="x", max_dims=2)
  assert back.dtype == values.dtype and back.shape == values.shape
  assert back.tobytes() == values.tobytes()


def test_a_view_that_is_not_contiguous_travels_as_its_values():
  values = np.arange(12, dtype=np.float32).reshape(3, 4).T
  assert (tensor.decode(tensor.encode(values), what="x", max_dims=2) == values).all()
  with pytest.raises(ValueError, match="float64 does not travel"):
    tensor.encode(np.zeros(3))


@given(
  dtype=st.sampled_from(["int32", "float32", "bfloat16", "object", ""]),
  shape=st.lists(st.integers(0, 2**32 - 1), max_size=4),
  data=st.binary(max_size=64),
  crc=st.integers(0, 2**32 - 1),
)
def test_hostile_tensors_are_refused_or_are_exactly_what_they_say(dtype, shape, data, crc):
  message = pb.Tensor(dtype=dtype, shape=shape, data=data, crc32=crc)
  try:
    found = tensor.decode(message, what="activations", max_dims=2)
  except ValueError as error:
    assert str(error).startswith("activations: ")
    return
  assert list(found.shape) == shape and found.tobytes() == data

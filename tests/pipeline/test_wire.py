import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurojax.config import Sampling
from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.stage.step import StepInput
from tests import tinymodel

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
  sent = pb.Tensor.FromString(messages.tensor(values).SerializeToString())
  back = messages.array(sent, what="x", max_dims=2)
  assert back.dtype == values.dtype and back.shape == values.shape
  assert back.tobytes() == values.tobytes()


def test_a_view_that_is_not_contiguous_travels_as_its_values():
  values = np.arange(12, dtype=np.float32).reshape(3, 4).T
  assert (messages.array(messages.tensor(values), what="x", max_dims=2) == values).all()
  with pytest.raises(ValueError, match="float64 does not travel"):
    messages.tensor(np.zeros(3))


@given(
  dtype=st.sampled_from(["int32", "float32", "bfloat16", "object", ""]),
  shape=st.lists(st.integers(0, 2**32 - 1), max_size=4),
  data=st.binary(max_size=64),
  crc=st.integers(0, 2**32 - 1),
)
def test_hostile_tensors_are_refused_or_are_exactly_what_they_say(dtype, shape, data, crc):
  message = pb.Tensor(dtype=dtype, shape=shape, data=data, crc32=crc)
  try:
    found = messages.array(message, what="activations", max_dims=2)
  except ValueError as error:
    assert str(error).startswith("activations: ")
    return
  assert list(found.shape) == shape and found.tobytes() == data


@given(st.builds(
  Sampling, temperature=st.floats(0, 100), top_k=st.one_of(st.none(), st.integers(1, 2**31 - 1)),
  top_p=st.floats(0.001, 1), min_p=st.floats(0, 1), repetition_penalty=st.floats(0.01, 10),
  presence_penalty=st.floats(-2, 2), frequency_penalty=st.floats(-2, 2), seed=st.integers(0, 2**64 - 1),
))  # fmt: skip
def test_sampling_travels_exactly(sampling: Sampling):
  message = pb.Sampling.FromString(messages.sampling(sampling).SerializeToString())
  assert messages.sampling_request(message) == sampling


def test_steps_travel_whole():
  given_step = StepInput(
    start=7,
    tokens=np.array([1, 2], np.int32),
    hidden=np.ones((2, 3), np.float32),
    is_answer=True,
    sample=True,
    targets=np.array([3, 4], np.int32),
  )
  message = pb.Step.FromString(messages.step("s", 5, given_step).SerializeToString())
  assert (message.sequence, message.index) == ("s", 5)
  back = messages.step_input(message)
  for field in dataclasses.fields(StepInput):
    np.testing.assert_array_equal(getattr(back, field.name), getattr(given_step, field.name))
  bare = messages.step_input(
    messages.step("s", 0, StepInput(start=0, tokens=np.array([1], np.int32)))
  )
  assert bare.hidden is None and bare.targets is None


def test_the_message_limit_holds_the_largest_step():
  config = tinymodel.CONFIG
  largest = StepInput(
    start=2**24 - 256,
    tokens=np.full(256, 2**31 - 1, np.int32),
    hidden=np.ones((256, config.model_dim), np.float32),
    targets=np.full(256, 2**31 - 1, np.int32),
  )
  frame = pb.Frame(step=messages.step("s" * 64, 2**32 - 1, largest))
  assert frame.ByteSize() <= messages.message_limit(config, 256)


def test_disagreements_name_both_sides():
  here = messages.identity(tinymodel.CONFIG, sha256="a" * 64, dtype="float32", context_length=5)
  there = pb.Identity()
  there.CopyFrom(here)
  assert messages.disagreement(here, there, fields=messages.SAME_MODEL) is None
  there.model_sha256 = ""
  found = messages.disagreement(here, there, fields=messages.SAME_MODEL)
  assert found == "model sha256 is aaaaaaaaaaaa here and none there"

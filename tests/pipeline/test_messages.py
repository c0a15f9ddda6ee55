import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from neurojax.config import Sampling
from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.stage.step import StepInput
from neurojax.wire.identity import disagreement
from tests import tinymodel


@given(st.builds(
  Sampling, temperature=st.floats(0, 100), top_k=st.one_of(st.none(), st.integers(1, 2**31 - 1)),
  top_p=st.floats(0.001, 1), min_p=st.floats(0, 1), repetition_penalty=st.floats(0.01, 10),
  presence_penalty=st.floats(-2, 2), frequency_penalty=st.floats(-2, 2), seed=st.integers(0, 2**64 - 1),
  logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-1e6, 1e6) | st.just(-np.inf)),
  min_tokens=st.integers(0, 2**31 - 1),
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


def test_a_step_is_these_bytes_until_the_protocol_is_raised():
  given_step = StepInput(
    start=7,
    tokens=np.array([1, 2], np.int32),
    hidden=np.ones((2, 1), np.float32),
    is_answer=True,
    sample=True,
  )
  frame = pb.Frame(step=messages.step("s", 5, given_step))
  assert messages.PROTOCOL == 2
  assert frame.SerializeToString().hex() == (
    "22450a01731005180722190a05696e7433321201021a08010000000200000020fcae841c2a1d0a07666c6f6174333212"
    "0202011a080000803f0000803f2090a399a80d30013801"
  )


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
  assert disagreement(here, there, fields=messages.SAME_MODEL) is None
  there.model_sha256 = ""
  found = disagreement(here, there, fields=messages.SAME_MODEL)
  assert found == "model sha256 is aaaaaaaaaaaa here and none there"

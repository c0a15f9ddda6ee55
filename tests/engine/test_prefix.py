"""The index of kept blocks: chains, room by last use, pins and claims."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from neurojax.engine.prefix import PrefixIndex, block_keys


def keys_of(*tokens: int, block: int = 1) -> tuple[bytes, ...]:
  return block_keys(np.array(tokens, np.int32), block)


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 5), st.data())
def test_a_key_names_all_tokens_up_to_its_end(tokens, block, data):
  keys = keys_of(*tokens, block=block)
  assert len(keys) == len(tokens) // block == len({*keys})
  end = data.draw(st.integers(0, len(tokens)))
  assert keys_of(*tokens[:end], block=block) == keys[: end // block]
  if tokens:
    place = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens]
    other[place] += 1
    same = [a == b for a, b in zip(keys, keys_of(*other, block=block), strict=True)]
    assert same == [(i + 1) * block <= place for i in range(len(keys))]


def keep(index: PrefixIndex, keys: tuple[bytes, ...]) -> list[int]:
  """Keep a prompt block by block; the places."""
  places = []
  for number, key in enumerate(keys):
    blocks = index.reserve([key], keys[number - 1] if number else None)
    index.settle(blocks, is_kept=True)
    places += [block.place for block in blocks]
  return places


def test_what_was_used_least_recently_makes_room_and_never_before_what_follows_it():
  index = PrefixIndex(4)
  first, second = keys_of(1, 2), keys_of(5, 6)
  places = keep(index, first) + keep(index, second)
  assert sorted(places) == [0, 1, 2, 3] and index.free == 0
  assert [block.place for block in index.find(first)] == places[:2]
  # The second prompt was used least recently: its leaf goes, then its root.
  assert keep(index, keys_of(9)) == [places[3]]
  assert keep(index, keys_of(1, 2, 3)) == [places[2]]
  assert len(index.find(keys_of(1, 2, 3))) == 3 and index.find(second) == [] and len(index) == 4


def test_a_block_is_found_only_once_it_is_kept_and_its_beginning_too():
  index = PrefixIndex(4)
  keys = keys_of(1, 2, 3)
  blocks = index.reserve(keys[:2], None)
  assert len(blocks) == 2 and index.find(keys) == []
  assert index.reserve(keys[:1], None) == []
  later = index.reserve(keys[2:], keys[1])
  index.settle(later, is_kept=True)
  assert index.find(keys) == []
  index.settle(blocks, is_kept=True)
  assert index.find(keys) == blocks + later
  assert index.reserve(keys_of(7, 8)[1:], keys_of(7, 8)[0]) == []


def test_a_block_that_failed_takes_those_behind_it_along():
  index = PrefixIndex(4)
  keys = keys_of(1, 2, 3)
  first, behind = index.reserve(keys[:1], None), index.reserve(keys[1:], keys[0])
  index.settle(first, is_kept=False)
  assert len(index) == 0 and index.free == 2
  index.settle(behind, is_kept=True)
  assert index.free == 4 and index.find(keys) == []


@pytest.mark.parametrize("wanted", [3, 5])
def test_more_than_there_is_room_for_is_not_kept_at_all(wanted):
  index = PrefixIndex(4)
  keys = keys_of(1, 2)
  keep(index, keys)
  index.pin(index.find(keys))
  assert index.reserve(keys_of(*range(10, 10 + wanted)), None) == []
  assert len(index.find(keys)) == 2
  index.unpin(index.find(keys))
  assert len(index.reserve(keys_of(*range(10, 13)), None)) == 3


def test_the_first_claim_counts():
  index = PrefixIndex(4)
  keys = keys_of(1, 2, 3)
  one, two = object(), object()
  index.claim(keys[:2], one)
  index.claim(keys, two)
  assert [index.claimant(key) for key in keys] == [one, one, two]
  index.release(keys, two)
  assert [index.claimant(key) for key in keys] == [one, one, None]


class Machine(RuleBasedStateMachine):
  """Whatever happens, no place has two users and none is lost."""

  written = Bundle("written")
  pinned = Bundle("pinned")

  def __init__(self):
    super().__init__()
    self.index = PrefixIndex(5)
    self.busy: list = []

  prompts = st.lists(st.integers(0, 1), min_size=1, max_size=5)

  @rule(target=written, tokens=prompts, start=st.integers(0, 4))
  def reserve(self, tokens, start):
    keys = keys_of(*tokens)
    blocks = self.index.reserve(keys[start:], keys[start - 1] if 0 < start <= len(keys) else None)
    self.busy += blocks
    return blocks

  @rule(blocks=consumes(written), is_kept=st.booleans())
  def settle(self, blocks, is_kept):
    self.index.settle(blocks, is_kept=is_kept)
    self.busy = [block for block in self.busy if block not in blocks]

  @rule(target=pinned, tokens=prompts)
  def pin(self, tokens):
    found = self.index.find(keys_of(*tokens))
    self.index.pin(found)
    self.busy += found
    return found

  @rule(blocks=consumes(pinned))
  def unpin(self, blocks):
    self.index.unpin(blocks)
    for block in blocks:
      self.busy.remove(block)

  @rule(tokens=prompts)
  def forget(self, tokens):
    for block in self.index.find(keys_of(*tokens))[1:]:
      self.index.forget(block)

  @rule()
  def clear(self):
    self.index.clear()
    assert len(self.index) == 0

  @invariant()
  def places_have_one_user(self):
    held = {id(block): block for block in [*self.index._blocks.values(), *self.busy]}
    places = [block.place for block in held.values()]
    assert sorted([*places, *self.index._free]) == list(range(5))

  @invariant()
  def beginnings_are_there(self):
    blocks = self.index._blocks
    for block in blocks.values():
      assert block.parent is None or blocks[block.parent.key] is block.parent


TestMachine = Machine.TestCase

"""Streams that are merged: every item once and in order, errors after what came before, nothing left over."""

import asyncio

import hypothesis
import pytest
from hypothesis import strategies as st

from neurojax.serve.feed import Feed
from tests.engine.virtual import run


async def count(number: int, gap_s: float, ended: list, fails_at: int | None = None):
  try:
    for i in range(number):
      await asyncio.sleep(gap_s)
      if i == fails_at:
        raise ValueError(f"item {i}")
      yield i
  finally:
    ended.append(number)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0, 1, 3])), max_size=4))
def test_every_item_comes_once_and_in_order(streams: list[tuple[int, int]]):
  async def work():
    ended: list[int] = []
    found: dict[int, list[int]] = {i: [] for i in range(len(streams))}
    async with Feed([count(n, gap, ended) for n, gap in streams]) as feed:
      while (items := await feed.next()) is not None:
        assert items
        for number, item in items:
          found[number].append(item)
    assert len(ended) == len(streams)
    return found

  assert run(work()) == {i: list(range(n)) for i, (n, _) in enumerate(streams)}


def test_an_error_comes_after_what_came_before_it_and_ends_the_others():
  async def work():
    ended: list[int] = []
    seen = []
    with pytest.raises(ValueError, match="item 2"):
      async with Feed([count(5, 1, ended, fails_at=2), count(9, 100, ended)]) as feed:
        while (items := await feed.next()) is not None:
          seen += items
    return seen, sorted(ended)

  assert run(work()) == ([(0, 0), (0, 1)], [5, 9])


def test_who_leaves_early_ends_the_streams():
  async def work():
    ended: list[int] = []
    async with Feed([count(5, 1, ended), count(6, 1, ended)]) as feed:
      await feed.next()
    return sorted(ended)

  assert run(work()) == [5, 6]


@pytest.mark.parametrize(("gap_s", "told"), [(1, 0), (100, 5)])
def test_it_is_told_when_nothing_comes_for_long(gap_s: float, told: int):
  async def work():
    idle = 0
    async with Feed([count(2, gap_s, [])], idle_s=10) as feed:
      while (items := await feed.next()) is not None:
        idle += not items
    return idle

  assert run(work()) >= told if told else run(work()) == 0

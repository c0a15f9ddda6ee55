"""Which blocks of prompts are kept, and where: the index of the prefix cache.

A block is a fixed number of prompt tokens together with all tokens before it. What the stages hold of
it lies in a place, the same number on every stage; this index alone decides what lies where.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np


def block_keys(tokens: np.ndarray, block: int) -> tuple[bytes, ...]:
  """Names of the whole blocks of a prompt: SHA-256 over the name before and the block's tokens.

  Args:
    tokens: int32 ids.
    block: Tokens in a block.
  """
  keys, parent = [], b""
  for start in range(0, len(tokens) - block + 1, block):
    parent = hashlib.sha256(parent + tokens[start : start + block].tobytes()).digest()
    keys.append(parent)
  return tuple(keys)


@dataclasses.dataclass(eq=False)
class Block:
  """A block of a prompt and its place.

  Attributes:
    key: Its name, which stands for all tokens up to its end.
    parent: The block before it; None for the first of a prompt.
    children: Blocks that follow it.
    pins: Sequences that are being opened with it.
    is_written: Whether the step that keeps it came back.
    is_gone: Whether it left the index; its place is free once nobody writes or reads it.
  """

  key: bytes
  place: int
  parent: "Block | None"
  children: set["Block"] = dataclasses.field(default_factory=set)
  pins: int = 0
  is_written: bool = False
  is_gone: bool = False


class PrefixIndex:
  """Keeps blocks in a number of places; the leaf that was used least recently makes room for new ones.

  A prompt that is being computed claims its blocks, so that others with the same beginning can wait
  for them.
  """

  def __init__(self, places: int):
    self._places, self._free = places, list(range(places))[::-1]
    # In the order of use, the least recent first; a block comes before the one it follows.
    self._blocks: dict[bytes, Block] = {}
    self._claims: dict[bytes, object] = {}

  def __len__(self) -> int:
    return len(self._blocks)

  @property
  def free(self) -> int:
    """Number of places that nobody uses."""
    return len(self._free)

  def find(self, keys: Sequence[bytes]) -> list[Block]:
    """The longest chain of kept blocks from the beginning of a prompt."""
    found = []
    for key in keys:
      block = self._blocks.get(key)
      if block is None or not block.is_written:
        break
      found.append(block)
    if found:
      self._touch(found[-1])
    return found

  def reserve(self, keys: Sequence[bytes], after: bytes | None) -> list[Block]:
    """Give new blocks a place, in which the step that computes them will keep them.

    Args:
      keys: Names of blocks that follow each other.
      after: Name of the block before them; None at the beginning of a prompt.
    Returns: The blocks; none if one of them is kept already, if the block before is not kept, or if not
      enough places can be made free.
    """
    parent = None if after is None else self._blocks.get(after)
    is_orphan = after is not None and parent is None
    if not 0 < len(keys) <= self._places or is_orphan or any(key in self._blocks for key in keys):
      return []
    if parent is not None:
      # It must not be the one that makes room.
      parent.pins += 1
    is_room = self._make_room(len(keys))
    if parent is not None:
      parent.pins -= 1
    if not is_room:
      return []
    made: list[Block] = []
    for key in keys:
      block = Block(key, self._free.pop(), parent)
      if parent is not None:
        parent.children.add(block)
      self._blocks[key] = parent = block
      made.append(block)
    self._touch(made[-1])
    return made

  def settle(self, blocks: Sequence[Block], *, is_kept: bool) -> None:
    """Take note that the step which was to keep these blocks came back."""
    for block in blocks:
      block.is_written = True
      if block.is_gone:
        self._free.append(block.place)
      elif not is_kept:
        self.forget(block)

  def pin(self, blocks: Sequence[Block]) -> None:
    """Hold the places of blocks while a sequence is opened with them."""
    for block in blocks:
      block.pins += 1

  def unpin(self, blocks: Sequence[Block]) -> None:
    """End what `pin` began."""
    for block in blocks:
      block.pins -= 1
      if block.is_gone and not block.pins:
        self._free.append(block.place)

  def forget(self, block: Block) -> None:
    """Keep a block and those that follow it no longer."""
    if block.parent is not None:
      block.parent.children.discard(block)
    gone = [block]
    while gone:
      block = gone.pop()
      gone += block.children
      if block.is_gone:
        continue
      block.is_gone = True
      self._blocks.pop(block.key, None)
      if block.is_written and not block.pins:
        self._free.append(block.place)

  def clear(self) -> None:
    """Forget every block, as after the failure of a stage."""
    for block in list(self._blocks.values()):
      self.forget(block)

  def claim(self, keys: Sequence[bytes], owner: object) -> None:
    """Say that `owner` is about to compute these blocks, but those that others claimed before."""
    for key in keys:
      self._claims.setdefault(key, owner)

  def release(self, keys: Sequence[bytes], owner: object) -> None:
    """End the claims of `owner`."""
    for key in keys:
      if self._claims.get(key) is owner:
        del self._claims[key]

  def claimant(self, key: bytes) -> object | None:
    """Who is about to compute a block."""
    return self._claims.get(key)

  def _make_room(self, count: int) -> bool:
    while len(self._free) < count:
      for block in self._blocks.values():
        if block.is_written and not block.pins and not block.children:
          self.forget(block)
          break
      else:
        return False
    return True

  def _touch(self, block: Block | None) -> None:
    while block is not None:
      self._blocks[block.key] = self._blocks.pop(block.key)
      block = block.parent

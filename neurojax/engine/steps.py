"""The seam between the batch of requests and the programs that compute its steps."""

from collections.abc import Sequence
from typing import Protocol

from neurojax.config import Sampling
from neurojax.stage.step import Row, RowOutput


class Steps(Protocol):
  """Computes steps of many rows, in this process or on stage servers.

  Sequences live in slots, which are independent of each other. Methods raise ValueError for what can
  never be served, and EngineError when computing failed; then every slot of the call is closed.

  Attributes:
    slots: Number of slots; they are numbered from 0.
    chunks: Lengths of a prompt's rows, ascending. A prompt is cut on the grid of the first: each of its
      rows starts at a multiple of chunks[0] and has chunks[0] tokens, or a longer length of the list where
      the rows it replaces would have given the same bits; only the last row may be shorter.
    most_draws: Tokens that a row may draw at most.
    most_drafts: Drafts that a step may have (`Row.draft`); its rows and their drafts together are one more
      at most. 0: no row may have any. Read only where drafts are wanted.
    places: Number of blocks of chunks[0] positions that can be kept for later prompts.
    ahead: Steps that may be under way at the same time.
    chains: Whether a row may go on from a token that a step under way is about to draw, and so is given
      without it (`Row.tokens` is None). Else the rows of a sequence are given one after the other came
      back, but those of its prompt.
  """

  slots: int
  chunks: tuple[int, ...]
  most_draws: int
  most_drafts: int
  places: int
  ahead: int
  chains: bool

  async def open(
    self,
    slot: int,
    sampling: Sampling,
    *,
    stop_ids: frozenset[int] = frozenset(),
    restore: Sequence[int] = (),
    copy: tuple[int, int] | None = None,
  ) -> None:
    """Begin a sequence in a free slot, on every stage.

    Args:
      stop_ids: Ids that are not drawn before `sampling.min_tokens`.
      restore: Places of kept blocks that the sequence begins with; it then stands at position
        len(restore) * chunks[0]. Their tokens are not told to the sampler yet: see `Row.seen`.
      copy: A slot and a number of positions: the sequence begins with those of that slot, which stays
        as it is.
    """
    ...

  async def step(self, rows: Sequence[Row]) -> list[RowOutput]:
    """Advance the sequences of some slots through every stage; at most one row for each.

    Steps are carried out in the order of the calls, and a row that fails does not hurt the others.
    """
    ...

  async def close(self, slot: int) -> None:
    """Free a slot on every stage that can be reached, after the steps that were given before.

    Closing a slot that is not open does nothing.
    """
    ...

"""The slots of a stage: which sequences are open, and how far each has come."""

import dataclasses

import numpy as np

from neurojax.model.sample import Kind
from neurojax.stage.step import Row


@dataclasses.dataclass
class Slot:
  """An open sequence.

  Attributes:
    kind: What its sampler has to do.
    length: Positions that the cache holds.
    has_drawn: Whether the device knows a token that was drawn after them.
    counts: Whether its sampler counts tokens, and so takes no drafts.
    drafts: Of the positions, those of the last drafts, while it is not known which were right.
  """

  kind: Kind
  length: int = 0
  has_drawn: bool = False
  counts: bool = False
  drafts: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What rows have to keep to.

  Attributes:
    slots: Number of slots.
    places: Places for kept blocks.
    block: Positions of a kept block.
    context_length: Positions that a sequence may use.
    vocab_size: Number of token ids.
    most_draws: Tokens that a row may draw.
    most_drafts: Drafts that a row may have.
    why_no_drafts: Why it may have none.
    is_first: Whether rows bring tokens; else activations.
    is_last: Whether this stage finds out which drafts were right.
    hidden: Width and dtype of activations that come in.
  """

  slots: int
  places: int
  block: int
  context_length: int
  vocab_size: int
  most_draws: int
  most_drafts: int
  why_no_drafts: str
  is_first: bool
  is_last: bool
  hidden: tuple[int, np.dtype]


class SlotTable:
  """Knows the open slots of a stage, and refuses rows that do not fit them.

  Methods raise ValueError, which names the value and what was expected.
  """

  def __init__(self, limits: Limits):
    self._limits = limits
    self._slots: dict[int, Slot] = {}

  def __len__(self) -> int:
    return len(self._slots)

  def __getitem__(self, slot: int) -> Slot:
    if slot not in self._slots:
      raise ValueError(f"slot {slot} is not open here")
    return self._slots[slot]

  def open(self, slot: int, kind: Kind, length: int = 0, *, counts: bool = False) -> None:
    if not 0 <= slot < self._limits.slots:
      raise ValueError(f"slot {slot}: this stage has slots 0..{self._limits.slots - 1}")
    if slot in self._slots:
      raise ValueError(f"slot {slot} is open already")
    if length > self._limits.context_length:
      raise ValueError(f"{length} positions pass the context of {self._limits.context_length}")
    self._slots[slot] = Slot(kind, length, counts=counts)

  def close(self, slot: int) -> None:
    """Close a slot; one that is not open is no error."""
    self._slots.pop(slot, None)

  def check_places(self, places: tuple[int, ...]) -> None:
    for place in places:
      if not 0 <= place < self._limits.places:
        raise ValueError(f"place {place}: this stage has {self._limits.places} places")

  def check(self, row: Row) -> None:
    """Refuse a row that does not fit its slot.

    Raises: FloatingPointError: activations are NaN or infinite. ValueError: anything else.
    """
    slot, limits = self[row.slot], self._limits
    self._check_start(row, slot)
    most = 1 if row.role == "prompt" else limits.most_draws
    least = 1 if row.role == "drawn" else 0
    if not least <= row.draws <= most:
      raise ValueError(f"draws = {row.draws} in a row of role {row.role!r}: {least} to {most}")
    end = row.start + row.length + max(row.draws - 1, 0) + row.drafts
    if end > limits.context_length:
      raise ValueError(
        f"positions {row.start}..{end - 1} pass the context of {limits.context_length}"
      )
    if row.allowed is not None and (
      row.draws != 1 or row.allowed.shape != (-(-limits.vocab_size // 32),)
    ):
      raise ValueError("a mask of allowed tokens needs draws = 1 and a bit for each token")
    self._check_ids(row, slot)
    self._check_draft(row, slot)
    self._check_kept(row)
    self._check_hidden(row)

  def _check_start(self, row: Row, slot: Slot) -> None:
    if slot.drafts and self._limits.is_last:
      raise ValueError("the last row's drafts are under way: wait for its tokens")
    if not slot.length - slot.drafts <= row.start <= slot.length:
      refused = f", or up to {slot.drafts} before that" if slot.drafts else ""
      raise ValueError(
        f"start = {row.start}: the sequence stands at position {slot.length}{refused}"
      )

  def _check_draft(self, row: Row, slot: Slot) -> None:
    if row.draft is None:
      return
    if row.draft.dtype != np.int32 or row.draft.ndim != 1:
      raise ValueError(f"draft {row.draft.dtype}{list(row.draft.shape)}: expected int32 [k]")
    if row.role != "drawn" or row.draws != 1:
      raise ValueError(
        f"drafts in a row of role {row.role!r} with draws = {row.draws}: they follow a drawn token,"
        " and draws = 1"
      )
    if row.drafts > self._limits.most_drafts:
      reason = f", as {self._limits.why_no_drafts}" if self._limits.why_no_drafts else ""
      raise ValueError(
        f"{row.drafts} drafts in a row: at most {self._limits.most_drafts} here{reason}"
      )
    if row.drafts and (slot.counts or row.allowed is not None):
      raise ValueError("drafts of a sequence with penalties or a mask: leave them out")

  def _check_ids(self, row: Row, slot: Slot) -> None:
    if row.tokens is None:
      if not slot.has_drawn or row.role != "drawn":
        raise ValueError("tokens are left out, and no token was drawn in this slot")
    elif row.tokens.dtype != np.int32 or row.tokens.ndim != 1 or len(row.tokens) == 0:
      raise ValueError(
        f"tokens {row.tokens.dtype}{list(row.tokens.shape)}: expected int32 [n], n > 0"
      )
    most = self._limits.vocab_size
    for name, ids in (
      ("token", row.tokens), ("target", row.targets), ("token", row.seen), ("draft", row.draft),
    ):  # fmt: skip
      if ids is not None and len(ids) and not 0 <= ids.min() <= ids.max() < most:
        bad = int(ids[(ids < 0) | (ids >= most)][0])
        raise ValueError(f"{name} {bad} is outside the vocabulary of {most}")
    if row.targets is not None:
      if row.tokens is None or row.targets.shape != row.tokens.shape:
        raise ValueError(f"{len(row.targets)} targets for {row.length} tokens")
      if row.role != "prompt":
        raise ValueError(f"targets in a row of role {row.role!r}: only prompts are scored")
    if row.role == "drawn" and row.length != 1:
      raise ValueError(f"{row.length} drawn tokens in a row: one at a time")

  def _check_kept(self, row: Row) -> None:
    self.check_places(row.keep)
    block = self._limits.block
    if row.keep and (row.start % block or len(row.keep) * block > row.length):
      raise ValueError(
        f"{len(row.keep)} blocks to keep of {row.length} tokens from position {row.start}: whole"
        f" blocks of {block} from a multiple of it"
      )

  def _check_hidden(self, row: Row) -> None:
    width, dtype = self._limits.hidden
    if self._limits.is_first:
      if row.hidden is not None:
        raise ValueError("activations sent to the first stage: it takes tokens")
      return
    if row.hidden is None:
      raise ValueError("no activations for a stage that is not the first")
    positions = row.length + row.drafts
    if row.hidden.shape != (positions, width) or row.hidden.dtype != dtype:
      raise ValueError(
        f"activations {row.hidden.dtype}{list(row.hidden.shape)}: expected"
        f" {dtype}{[positions, width]}"
      )
    if not np.isfinite(row.hidden).all():
      raise FloatingPointError("activations that came in are NaN or infinite")

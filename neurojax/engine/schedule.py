"""Which rows the next step has: one of a prompt, or those of many answers."""

from collections.abc import Callable
from collections.abc import Sequence as Items

from neurojax.engine.pace import Pace
from neurojax.engine.prefix import Block, PrefixIndex
from neurojax.engine.sequence import Part, Sequence
from neurojax.engine.steps import Steps


class Schedule:
  """Chooses rows.

  Between two steps of answers there is one row of a prompt at most, so that a long prompt delays nobody
  by more than a row; prompts that are alone have longer ones.

  Args:
    few_draws, cohorts: As for `engine.batch.Batch`.
    pace: Says how many tokens to guess; None: none.
    on_failure: Is told of a sequence whose row cannot be made.

  Attributes:
    index: The blocks that are kept.
  """

  def __init__(
    self,
    steps: Steps,
    index: PrefixIndex,
    *,
    few_draws: int | None = None,
    cohorts: int | None = None,
    pace: Pace | None = None,
    on_failure: Callable[[Sequence, Exception], None],
  ):
    self.index = index
    self._chunks, self._block = steps.chunks, steps.chunks[0]
    self._most_draws = steps.most_draws
    self._few_draws = min(steps.most_draws, few_draws or max(1, steps.most_draws // 4))
    self._cohorts = cohorts or (1 if steps.chains else steps.ahead)
    # Steps under way with rows of one answer.
    self._most_flying = max(1, steps.ahead // self._cohorts) if steps.chains else 1
    self._pace = pace
    self._on_failure = on_failure
    self._was_prompt = False
    self._turn = 0

  def next(self, running: Items[Sequence], *, are_waiting: bool) -> list[Part]:
    """The rows of the next step; none if all depends on steps under way.

    Args:
      running: Those who have a slot and keep it.
      are_waiting: Whether others wait for a slot.
    """
    answering = [s for s in running if s.wants_draws]
    prompts = [s for s in running if s.phase == "prompt" and not _is_held(s)]
    parts: list[Part] = []
    if prompts and not (answering and self._was_prompt):
      parts = self._prompt(prompts, is_alone=not answering)
      self._was_prompt = bool(parts)
    if not parts:
      are_few = are_waiting or any(s.phase != "answer" for s in running)
      parts = self._answers(answering, self._few_draws if are_few else self._most_draws)
      self._was_prompt = self._was_prompt and not parts
    self._turn += 1
    for part in parts:
      part.sequence.turn = self._turn
    return parts

  def _answers(self, answering: list[Sequence], draws: int) -> list[Part]:
    size = self._pace.size([s.guesses for s in answering]) if self._pace and answering else 0
    if size and any(s.flying for s in answering):
      return []  # Guesses go by the last tokens, which are about to come.
    cohort = self._cohort(answering)
    drafts = self._drafts(cohort, size) if size else None
    if drafts is not None:
      draws = 1
    parts = []
    for index, sequence in enumerate(cohort):
      try:
        draft = drafts[index] if drafts and any(drafts) else None
        row = sequence.answer_row(draws, draft)
        parts.append(Part(sequence, row, is_guessing=drafts is not None))
      except Exception as error:
        self._on_failure(sequence, error)
    return parts

  def _drafts(self, cohort: list[Sequence], size: int) -> list[list[int]]:
    """Guesses for all of them, as many as fit in a step."""
    assert self._pace is not None
    left, drafts = self._pace.most_drafts + 1 - len(cohort), []
    for place, sequence in enumerate(cohort):
      share = -(-left // (len(cohort) - place))
      drafts.append(sequence.guess(min(size, share)))
      left -= len(drafts[-1])
    return drafts

  def _cohort(self, answering: list[Sequence]) -> list[Sequence]:
    """Chooses the answers that go on in the next step, in the order of their slots."""
    ready = [
      s
      for s in answering
      if s.flying < self._most_flying and not s.guessed and (s.knows_last or not s.constraint)
    ]
    if self._cohorts == 1:
      return ready
    share = -(-len(answering) // self._cohorts)
    chosen = sorted(ready, key=lambda s: (s.flying, s.turn))[:share]
    return sorted(chosen, key=lambda s: s.slot or 0)

  def _prompt(self, prompts: list[Sequence], *, is_alone: bool) -> list[Part]:
    """The next row of the prompt that has the fewest left, less those that it let pass."""

    def rank(s: Sequence) -> tuple[int, int, int]:
      left = -(-(len(s.prompt) - s.at) // self._block)
      return s.ticket.priority, left - s.passed, s.ticket.number

    chosen = min(prompts, key=rank)
    for other in prompts:
      other.passed += other is not chosen
    length = self._length(chosen, is_alone)
    blocks = self._keep(chosen, length)
    try:
      row = chosen.prompt_row(length, tuple(block.place for block in blocks))
    except Exception as error:
      self.index.settle(blocks, is_kept=False)
      self._on_failure(chosen, error)
      return []
    return [Part(chosen, row, blocks)]

  def _length(self, sequence: Sequence, is_alone: bool) -> int:
    """Tokens of the next row of a prompt."""
    left = len(sequence.prompt) - sequence.at
    if len(sequence.ticket.sequences) > 1 and sequence.at < sequence.last_block:
      # Other answers are copied from it where the last block begins.
      left = sequence.last_block - sequence.at
    whole = [chunk for chunk in (self._chunks if is_alone else self._chunks[:1]) if chunk <= left]
    return whole[-1] if whole else left

  def _keep(self, sequence: Sequence, length: int) -> list[Block]:
    """Places for the whole blocks of a row; none, and no claim on them, if they cannot be kept."""
    first, last = sequence.at // self._block, (sequence.at + length) // self._block
    parent = sequence.keys[first - 1] if first and sequence.keys else None
    blocks = self.index.reserve(sequence.keys[first:last], parent)
    if not blocks:
      self.index.release(sequence.keys, sequence)
    return blocks


def _is_held(sequence: Sequence) -> bool:
  """Whether it stands where other answers of its request are about to be copied from it."""
  others = sequence.ticket.sequences
  if len(others) == 1 or sequence.at != sequence.last_block:
    return False
  return bool(sequence.holds) or any(s.phase == "waiting" and not s.is_leaving for s in others)

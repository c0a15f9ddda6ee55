"""Measures the perplexity of a text with any engine."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from neurojax.engine.api import Engine
from neurojax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
  """The perplexity of a text and the numbers behind it.

  Attributes:
    perplexity: exp(nll).
    nll: Mean negative log-likelihood of a token, in nats.
    stderr: Standard error of the perplexity, from the spread of single tokens.
    tokens: Number of tokens that were scored.
    windows: Number of windows.
  """

  perplexity: float
  nll: float
  stderr: float
  tokens: int
  windows: int


async def perplexity(
  engine: Engine,
  tokenizer: Tokenizer,
  text: str,
  *,
  ctx: int,
  stride: int | None = None,
  chunks: int | None = None,
  progress: Callable[[int, int, float], None] | None = None,
) -> PerplexityResult:
  """Score `text` in windows of `ctx` tokens.

  Args:
    ctx: Tokens of a window.
    stride: Tokens from the start of one window to that of the next; each window scores what no earlier
      one did. None takes llama.cpp's windows (see `windows`).
    chunks: Number of windows to score, from the first; None scores all.
    progress: Called with windows done, windows in all, and the perplexity so far.
  Raises: ValueError: the text is too short, or ctx, stride or chunks make no sense.
  """
  check_windows(ctx=ctx, stride=stride, chunks=chunks)
  if ctx > engine.context_length:
    raise ValueError(f"ctx = {ctx}: the engine's context is {engine.context_length}")
  ids = tokenizer.encode(text, parse_special=False, add_special=True)
  plan = list(windows(len(ids), ctx=ctx, stride=stride))[:chunks]
  if not plan:
    raise ValueError(f"the text has {len(ids)} tokens: at least {ctx} are needed")
  losses: list[np.ndarray] = []
  for done, (start, end, first) in enumerate(plan, start=1):
    window = ids[start:end]
    if stride is None and tokenizer.spec.add_bos and tokenizer.bos_id is not None:
      window = [tokenizer.bos_id, *window[1:]]
    scores = await engine.score(window, first=first)
    losses.append(-scores.logprobs.astype(np.float64))
    if progress:
      progress(done, len(plan), _exp(float(np.concatenate(losses).mean())))
  loss = np.concatenate(losses)
  nll = float(loss.mean())
  spread = float(loss.std(ddof=1) / math.sqrt(len(loss))) if len(loss) > 1 else math.nan
  return PerplexityResult(_exp(nll), nll, _exp(nll) * spread, len(loss), len(plan))


def check_windows(*, ctx: int, stride: int | None, chunks: int | None) -> None:
  """Refuse windows that make no sense for any text. Raises: ValueError: names the value."""
  if ctx < 4:
    raise ValueError(f"ctx = {ctx}: at least 4")
  if stride is not None and not 1 <= stride < ctx:
    raise ValueError(f"stride = {stride}: between 1 and {ctx - 1}, so that windows overlap")
  if chunks is not None and chunks < 1:
    raise ValueError(f"chunks = {chunks}: at least 1")


def _exp(nll: float) -> float:
  return math.exp(nll) if nll < 700 else math.inf


def windows(length: int, *, ctx: int, stride: int | None) -> Iterator[tuple[int, int, int]]:
  """Divide `length` tokens into windows.

  Without a stride these are llama.cpp's: windows of exactly ctx tokens side by side, the rest of the
  text dropped. Index ctx/2 is the last that is only context, so each scores ctx - ctx/2 - 1 tokens.

  Yields: (start, end, first): tokens start..end-1 are a window, scored from index `first` within it.
  Source: llama.cpp, tools/perplexity.
  """
  if stride is None:
    for start in range(0, length - ctx + 1, ctx):
      yield start, start + ctx, ctx // 2 + 1
    return
  scored = 1  # The first token of the text has no context.
  for start in range(0, length, stride):
    end = min(start + ctx, length)
    if end > scored:
      yield start, end, max(scored - start, 1)
      scored = end
    if end == length:
      return

"""What a model gives back: small dataclasses that print as text and show themselves in a notebook."""

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence

from neurojax.config import Serving
from neurojax.engine.api import FinishReason, StageReport


@dataclasses.dataclass(frozen=True)
class Piece:
  """Text that became certain with one token of an answer; it may be empty.

  Attributes:
    text: The new text. Stop tokens and stop strings are never part of it.
    token: The id of the token.
    logprob: Natural logarithm of the token's probability under the model's own logits.
    finish_reason: "stop" or "length" on the last piece, else None.

  Example:
    >>> import neurojax as nj
    >>> print(nj.Piece(" sea", token=480, logprob=-0.1), end="")
     sea
  """

  text: str
  token: int
  logprob: float
  finish_reason: FinishReason | None = None

  def __str__(self) -> str:
    return self.text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
  """Seconds from the request on.

  Attributes:
    first_token_s: Until the first token.
    total_s: Until the last one.
    tokens_per_s: Tokens after the first for each second after it; None for a single token.
  """

  first_token_s: float
  total_s: float
  tokens_per_s: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """A whole answer. `str` of it is its text.

  Attributes:
    text: The answer, without the prompt.
    prompt_tokens: Ids of the prompt.
    tokens: Ids of the answer, a stop token included.
    logprobs: Natural logarithm of each token's probability under the model's own logits.
    finish_reason: "stop" for a stop token or stop string, "length" for `max_tokens`.
    times: How long it took.

  Example:
    >>> import neurojax as nj
    >>> with nj.load("neurollm") as model:
    ...   answer = model.generate("The sea was", max_tokens=4)
    >>> len(answer.tokens), answer.finish_reason, str(answer) == answer.text
    (4, 'length', True)
  """

  text: str
  prompt_tokens: tuple[int, ...]
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]
  finish_reason: FinishReason | None
  times: Times

  def __str__(self) -> str:
    return self.text

  def _repr_html_(self) -> str:
    rate = self.times.tokens_per_s
    speed = "" if rate is None else f", {rate:.1f} tokens/s after it"
    foot = (
      f"{len(self.prompt_tokens)} + {len(self.tokens)} tokens, first after "
      f"{self.times.first_token_s:.2f} s{speed}, ended by {self.finish_reason}"
    )
    return (
      f"<div style='white-space:pre-wrap'>{html.escape(self.text)}</div>"
      f"<small style='opacity:.7'>{html.escape(foot)}</small>"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
  """How probable a text is.

  Attributes:
    tokens: Ids of the text.
    logprobs: log p(tokens[i] | tokens[:i]) for i from `first` on.
    first: Index of the first token that is scored.

  Example:
    >>> import neurojax as nj
    >>> round(nj.Score(tokens=(0, 480, 1469), logprobs=(-1.0, -2.0)).perplexity, 3)
    4.482
  """

  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]
  first: int = 1

  @property
  def perplexity(self) -> float:
    """exp of the mean negative log-probability."""
    return math.exp(-math.fsum(self.logprobs) / len(self.logprobs))

  def _repr_html_(self) -> str:
    return f"<b>perplexity {self.perplexity:.3f}</b> over {len(self.logprobs)} tokens"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """How a model is held, and how long its decode steps took so far.

  Attributes:
    model: The path of the model file.
    serving: How the model is held and run, every choice made.
    stages: One entry for each stage, in the order of the layers.

  Example:
    >>> import neurojax as nj
    >>> with nj.load("neurollm") as model:
    ...   print([stage.last_layer for stage in model.report().stages])
    [11]
  """

  model: str
  serving: Serving
  stages: tuple[StageReport, ...]

  def _repr_html_(self) -> str:
    rows = [
      (
        stage.host,
        f"{stage.first_layer}..{stage.last_layer}",
        f"{stage.weight_bytes / 1e6:,.1f} MB",
        f"{stage.cache_bytes / 1e6:,.1f} MB",
        "-" if stage.step_s is None else f"{stage.step_s * 1e3:.2f} ms",
        "-" if stage.wire_s is None else f"{stage.wire_s * 1e3:.2f} ms",
      )
      for stage in self.stages
    ]
    names = ("host", "layers", "weights", "cache of a sequence", "step", "wire")
    form = f"{self.serving.weights}, {self.serving.dtype}, context {self.serving.context}"
    return f"<b>{html.escape(self.model)}</b> ({form}){_table(names, rows)}"


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
  body = "".join(
    "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
  )
  return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

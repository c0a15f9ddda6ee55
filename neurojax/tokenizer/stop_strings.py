"""Finds stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
  """Passes text on up to the earliest stop string, however the text is cut into pieces.

  Text that may yet turn out to begin a stop string is held back.

  Attributes:
    hit: True once a stop was found. That can be as late as `finish`, while a longer stop that began
      earlier is still possible.

  Raises: ValueError: a stop is empty or not a string.
  Source: Knuth, Morris and Pratt 1977; constant work per character and stop.
  """

  def __init__(self, stops: Sequence[str]):
    if isinstance(stops, str):
      raise ValueError(f"stops is the string {stops!r}; give a list of strings")
    for stop in stops:
      if not isinstance(stop, str) or not stop:
        raise ValueError(f"stop string is {stop!r}; it must be a string that is not empty")
    self._stops = tuple(dict.fromkeys(stops))
    self._failures = tuple(map(_failures, self._stops))
    # How many characters of each stop the text now ends with.
    self._matched = [0] * len(self._stops)
    self._held = ""
    # Where the earliest complete stop begins in the held text.
    self._found: int | None = None
    self.hit = False

  def push(self, text: str) -> tuple[str, bool]:
    """Takes the next piece.

    Returns: The text that is safe to pass on, and whether a stop was hit; after a hit nothing more
      comes out.
    """
    if self.hit:
      return "", True
    start = len(self._held)
    self._held += text
    for end in range(start + 1, len(self._held) + 1):
      self._step(self._held[end - 1], end)
      pending = end - max(self._matched, default=0)
      if self._found is not None and self._found <= pending:
        return self._stop(), True
    size = len(self._held)
    safe = size - max(self._matched, default=0)
    out, self._held = self._held[:safe], self._held[safe:]
    if self._found is not None:
      self._found -= safe
    return out, False

  def finish(self) -> str:
    """Returns the text that was held back, up to a stop in it; nothing may be pushed after."""
    if self._found is not None:
      return self._stop()
    out, self._held = self._held, ""
    self._matched = [0] * len(self._stops)
    return out

  def _stop(self) -> str:
    out = self._held[: self._found]
    self._held, self._found, self.hit = "", None, True
    return out

  def _step(self, char: str, end: int):
    for i, stop in enumerate(self._stops):
      matched = self._matched[i]
      while matched and stop[matched] != char:
        matched = self._failures[i][matched - 1]
      if stop[matched] == char:
        matched += 1
      if matched == len(stop):
        begin = end - matched
        self._found = begin if self._found is None else min(self._found, begin)
        matched = self._failures[i][matched - 1]
      self._matched[i] = matched


def _failures(stop: str) -> list[int]:
  """Returns, for each prefix, the length of its longest proper prefix that is also its suffix."""
  failures = [0] * len(stop)
  matched = 0
  for i in range(1, len(stop)):
    while matched and stop[matched] != stop[i]:
      matched = failures[matched - 1]
    if stop[matched] == stop[i]:
      matched += 1
    failures[i] = matched
  return failures

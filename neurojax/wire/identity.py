"""Comparison of what two peers say that they are."""

import neurojax

PACKAGE = neurojax.__version__
"""Version of this package, which peers compare."""


def disagreement(here: object, there: object, *, fields: tuple[str, ...]) -> str | None:
  """Find the first field in which two identities differ.

  Args:
    here: Message or object with `fields` as attributes; fields that end in "sha256" hold digests.
    there: The same from the peer.
  Returns: The difference in words, None if they agree.
  """
  for name in fields:
    mine, theirs = getattr(here, name), getattr(there, name)
    if mine != theirs:
      if name.endswith("sha256"):
        mine, theirs = mine[:12] or "none", theirs[:12] or "none"
      return f"{name.replace('_', ' ')} is {printable(mine)} here and {printable(theirs)} there"
  return None


def printable(value: object, most: int = 2000) -> str:
  """Make a peer's text fit to print: control characters are escaped, and the length is bounded.

  A terminal obeys control characters, and a log file reads a line break as another entry.
  """
  text = str(value)[:most]
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

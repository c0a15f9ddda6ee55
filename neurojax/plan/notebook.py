"""Results as a notebook shows them: one sentence and one table."""

import html
from collections.abc import Iterable, Sequence


def shown(sentence: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
  """HTML of a sentence above a table. Every text is escaped.

  Args:
    rows: Cells in the order of `header`. Columns of numbers should be formatted by the caller.
  """
  head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
  body = "".join(
    "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
  )
  table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
  return f"<p>{html.escape(sentence)}</p>{table}"

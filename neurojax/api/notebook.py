"""Progress of opening a model as a bar in a notebook's cell."""

import html
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from neurojax.api.opening import Progress


def in_notebook() -> bool:
  """Whether this process is the kernel of a notebook."""
  ipython = sys.modules.get("IPython")
  shell = ipython.get_ipython() if ipython is not None else None
  return type(shell).__name__ == "ZMQInteractiveShell"


class Bar:
  """A progress callback that draws in the cell it was made in, and leaves nothing when it ends."""

  def __init__(self) -> None:
    from IPython.display import HTML, display

    self._html = HTML
    self._handle: Any = display(HTML(""), display_id=True)

  def __call__(self, progress: "Progress") -> None:
    bounds = f" value={progress.done} max={progress.total}" if progress.total is not None else ""
    self._handle.update(self._html(f"<progress{bounds}></progress> {html.escape(progress.what)}"))

  def end(self) -> None:
    """Take the bar away."""
    self._handle.update(self._html(""))

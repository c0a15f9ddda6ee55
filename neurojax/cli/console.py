"""What the command line says on standard error while it works: on a terminal, and only there."""

import contextlib
from collections.abc import Generator

from rich.console import Console
from rich.progress import Progress, ProgressColumn

stderr = Console(stderr=True)


def progress(*columns: ProgressColumn) -> Progress:
  """Bars that vanish when the work is done."""
  return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_interactive)


@contextlib.contextmanager
def importing_jax() -> Generator[None]:
  """Says what takes the first seconds: put imports of modules that need JAX under it."""
  with stderr.status("importing JAX"):
    yield

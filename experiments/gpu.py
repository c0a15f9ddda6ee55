"""Experiments that need a GPU say so before they begin, and leave old results if they fail."""

import subprocess
import sys
from collections.abc import Callable

_QUESTION = (
  "import jax; d = jax.devices()[0]; print(d.platform, getattr(d, 'compute_capability', ''))"
)


def on_gpu(measure: Callable[[], None]) -> None:
  """Run `measure` if there is a Hopper GPU; exit with a message if not, or if a command of it fails."""
  # In a process of its own, which leaves the GPU's memory to the measured one.
  found = subprocess.run(
    [sys.executable, "-c", _QUESTION], stdout=subprocess.PIPE, text=True, check=False
  ).stdout.strip()
  if found != "gpu 9.0":
    sys.exit(
      f"needs a GPU of compute capability 9.0 and the extra cuda13; JAX finds: {found or '-'}"
    )
  try:
    measure()
  except subprocess.CalledProcessError as error:
    sys.exit(f"results stay as they were: exit code {error.returncode} of {' '.join(error.cmd)}")

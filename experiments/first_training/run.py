"""Run the first example of docs/training.md as printed, and write what it prints below it.

python -m experiments.first_training.run
"""

import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from experiments.readme import DOCS, block, runnable, scratch

PAGE = DOCS / "training.md"
HEAD, TAIL = 3, 3
"""Lines of a long output that are shown, at its beginning and its end."""


def transcript(folder: Path) -> str:
  """Run the commands in a folder. Returns Markdown. Raises CalledProcessError: one fails."""
  language, commands = runnable(PAGE)[0]
  assert language == "sh"
  environment = scratch(folder) | {"NO_COLOR": "1", "NEUROJAX_CACHE_DIR": str(folder / "cache")}
  out, total_s, began_cpu_s = [], 0.0, _cpu_s()
  for command in commands.splitlines():
    began_s = time.perf_counter()
    done = subprocess.run(
      command, shell=True, cwd=folder, env=environment, check=True, text=True,
      stdout=subprocess.PIPE,
    )  # fmt: skip
    took_s = time.perf_counter() - began_s
    total_s += took_s
    lines = [line.rstrip() for line in done.stdout.rstrip("\n").splitlines()]
    if len(lines) > HEAD + TAIL + 1:
      lines = [*lines[:HEAD], "...", *lines[-TAIL:]]
    verb = command.removeprefix("neurojax ").partition(" --")[0].partition(" README")[0]
    out += [f"$ neurojax {verb} ...     # {took_s:.0f} s", *lines]
  cores = len(os.sched_getaffinity(0))
  return (
    "```\n" + "\n".join(out) + f"\n```\n\nTogether {total_s:.0f} s on {cores} cores, with"
    f" {_cpu_s() - began_cpu_s:.0f} s of processor time; what else the machine does makes it longer.\n"
  )


def _cpu_s() -> float:
  """Processor time of the commands that have ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


if __name__ == "__main__":
  with tempfile.TemporaryDirectory() as name:
    block("first_training", transcript(Path(name)), PAGE)

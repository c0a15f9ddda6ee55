"""Reads and writes tables of the fastest implementation for each product: tuned/<device>.json.

    {"device": "NVIDIA H200",
     "source": "how the file was made",
     "entries": [{"mode": "w2a8", "m": 8, "n": 4096, "k": 4096,
                  "implementation": "triton", "parameters": {"warps": 2}}]}

An entry holds for n channels, k contracted elements, and up to m rows, down to the next smaller m of
its mode. Between two numbers of rows that were measured, that is a guess.
"""

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from neurojax.weights.ternary import Mode

FOLDER = Path(__file__).with_name("tuned")


@dataclass(frozen=True)
class Entry:
  """One line of a table.

  Attributes:
    m: Most rows that the entry is for.
    parameters: Keyword arguments of the implementation's `matmul`.
  """

  mode: Mode
  m: int
  n: int
  k: int
  implementation: str
  parameters: dict[str, Any]


def path_for(device_kind: str, folder: Path = FOLDER) -> Path:
  """The path of a device's table, by the name that JAX gives the device."""
  name = re.sub("[^a-z0-9]+", "-", device_kind.lower()).strip("-")
  return folder / f"{name}.json"


def write(path: Path, device_kind: str, source: str, entries: Sequence[Entry]) -> None:
  """Write a table in place of the one that was there. Raises: ValueError: no entries."""
  if not entries:
    raise ValueError(f"no kernel was measured on {device_kind}: its table stays as it is")
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = ",\n".join(f"    {json.dumps(asdict(entry))}" for entry in entries)
  head = f'  "device": {json.dumps(device_kind)},\n  "source": {json.dumps(source)},\n'
  whole = path.with_suffix(".new")
  whole.write_text(f'{{\n{head}  "entries": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
  whole.replace(path)
  load.cache_clear()


@functools.cache
def load(device_kind: str, folder: Path = FOLDER) -> tuple[Entry, ...]:
  """Read the entries of a device, by the name that JAX gives it; none if nobody measured it.

  Raises: ValueError: the file is not a table.
  """
  path = path_for(device_kind, folder)
  if not path.exists():
    return ()
  try:
    table = json.loads(path.read_text(encoding="utf-8"))
    entries = tuple(Entry(**entry) for entry in table["entries"])
    for entry in entries:
      _check(entry)
    return entries
  except (KeyError, TypeError, ValueError, OSError) as error:
    raise ValueError(f"{path}: not a table of tuned products ({error!r}): measure anew") from error


def _check(entry: Entry) -> None:
  if entry.mode not in get_args(Mode):
    raise ValueError(f"mode = {entry.mode!r}")
  for name in ("m", "n", "k"):
    value = getattr(entry, name)
    if type(value) is not int or value < 1:
      raise ValueError(f"{name} = {value!r}")
  if not isinstance(entry.implementation, str) or not isinstance(entry.parameters, dict):
    raise ValueError(f"{entry.implementation!r} with {entry.parameters!r}")


def find(entries: Sequence[Entry], mode: Mode, m: int, n: int, k: int) -> Entry | None:
  """Find the entry for a product: among those for its number of rows, the one of nearest n and k."""
  entries = [entry for entry in entries if entry.mode == mode]
  if not entries:
    return None
  rows = sorted({entry.m for entry in entries})
  bucket = next((most for most in rows if m <= most), rows[-1])

  def distance(entry: Entry) -> float:
    return abs(math.log2(entry.n / n)) + abs(math.log2(entry.k / k))

  return min((entry for entry in entries if entry.m == bucket), key=distance)

"""Where large test data lives that the repository does not carry."""

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[1].parent / "shared"


def shared(*parts: str) -> Path:
  """A path in the folder of shared data; skips the test where the data are absent.

  The folder is NEUROJAX_SHARED, else `shared` beside the repository.
  """
  path = Path(os.environ.get("NEUROJAX_SHARED") or _BESIDE).joinpath(*parts)
  if not path.exists():
    pytest.skip(f"shared data absent: {path} (name their folder in NEUROJAX_SHARED)")
  return path

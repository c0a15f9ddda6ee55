"""Where things are kept on this machine."""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
  """The folder for what can be computed again: NEUROJAX_CACHE_DIR, else the user's cache folder."""
  override = os.environ.get("NEUROJAX_CACHE_DIR")
  return Path(override) if override else Path(platformdirs.user_cache_dir("neurojax"))

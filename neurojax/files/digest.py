"""SHA-256 of whole files, remembered between runs."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path

from neurojax.folders import cache_dir

# A file system may stamp two writes within one tick with the same time: a younger file is hashed
# anew each time rather than remembered (Git's "racy" rule).
_SETTLED_NS = 2_000_000_000


def sha256_of(path: str | Path, *, opened_as: os.stat_result | None = None) -> str:
  """The SHA-256 of a file in hex, from the cache while path, size, time and inode are unchanged.

  Args:
    opened_as: The result of `os.fstat` when the file was opened; only that very file is hashed.
  Raises:
    FileNotFoundError: no such file.
    ValueError: it changed while it was read, or it is not the one that was opened.
  """
  path = Path(path)
  if opened_as is not None:
    check_unchanged(path, opened_as)
  path = path.resolve(strict=True)
  key, entry = _key(path), _entry(path)
  known = _load(entry)
  if known is not None and {name: known.get(name) for name in key} == key:
    return str(known["sha256"])
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  if _key(path) != key:
    raise ValueError(f"{path}: it changed while it was read: wait until it is complete")
  if time.time_ns() - int(key["mtime_ns"]) > _SETTLED_NS:
    _store(entry, {**key, "sha256": digest})
  return digest


def is_known(path: Path) -> bool:
  """Whether a digest was ever remembered for this path, even if the file has changed since."""
  return _load(_entry(path.resolve(strict=True))) is not None


def remember(path: Path, sha256: str) -> None:
  """Remember the digest of a file that was just hashed and that nobody writes any more."""
  path = path.resolve(strict=True)
  _store(_entry(path), {**_key(path), "sha256": sha256})


def check_unchanged(path: Path, opened_as: os.stat_result) -> None:
  """Raises ValueError if the file at `path` was replaced, changed or removed since it was opened."""
  if not path.exists() or _stamp(path.stat()) != _stamp(opened_as):
    raise ValueError(
      f"{path}: it was replaced, changed or removed since it was opened: start again"
    )


def _entry(path: Path) -> Path:
  return cache_dir() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
  return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _key(path: Path) -> dict[str, str | int]:
  stat = path.stat()
  return {
    "path": str(path), "size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns,
    "inode": stat.st_ino,
  }  # fmt: skip


def _load(entry: Path) -> dict[str, object] | None:
  """The entry, or None when it is absent or damaged: it can be computed again."""
  try:
    table = json.loads(entry.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return None
  if not isinstance(table, dict) or not re.fullmatch("[0-9a-f]{64}", str(table.get("sha256"))):
    return None
  return table


def _store(entry: Path, table: dict[str, str | int]) -> None:
  # A cache that cannot be written costs time, nothing else.
  with contextlib.suppress(OSError):
    entry.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=entry.parent, prefix=".digest-")
    try:
      with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(table, file)
      os.replace(temporary, entry)
    except BaseException:
      Path(temporary).unlink(missing_ok=True)
      raise

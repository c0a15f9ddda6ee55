"""Digests are right, remembered, and a damaged memory never matters."""

import hashlib
import os
from pathlib import Path

import pytest

from neurojax.files import digest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  monkeypatch.setenv("NEUROJAX_CACHE_DIR", str(tmp_path / "cache"))
  return tmp_path / "cache" / "digests"


def settled(path: Path, data: bytes, mtime_s: int = 1_000_000_000) -> Path:
  """A file whose last write lies long ago."""
  path.write_bytes(data)
  os.utime(path, (mtime_s, mtime_s))
  return path


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
  def refuse(*_: object) -> None:
    raise AssertionError("hashed again")

  monkeypatch.setattr(hashlib, "file_digest", refuse)


def test_right_and_remembered(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  path = settled(tmp_path / "a", b"neuro" * 100_000)
  expected = hashlib.sha256(b"neuro" * 100_000).hexdigest()
  assert digest.sha256_of(path) == expected
  assert len(list(cache.iterdir())) == 1
  forbid_reading(monkeypatch)
  (tmp_path / "link").symlink_to(path)
  assert digest.sha256_of(path) == digest.sha256_of(tmp_path / "link") == expected


def test_a_changed_file_is_hashed_again(tmp_path: Path, cache: Path) -> None:
  path = settled(tmp_path / "a", b"one")
  digest.sha256_of(path)
  settled(path, b"two", mtime_s=1_000_000_001)  # the same size
  assert digest.sha256_of(path) == hashlib.sha256(b"two").hexdigest()
  other = settled(tmp_path / "b", b"six", mtime_s=1_000_000_001)
  os.replace(other, path)  # the same size and time
  assert digest.sha256_of(path) == hashlib.sha256(b"six").hexdigest()


def test_a_fresh_file_is_not_remembered(tmp_path: Path, cache: Path) -> None:
  (tmp_path / "a").write_bytes(b"one")
  assert digest.sha256_of(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()
  assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"sha256": "x"}', b"[" * 100_000])
def test_damage_is_rewritten(tmp_path: Path, cache: Path, damage: bytes) -> None:
  path = settled(tmp_path / "a", b"one")
  expected = digest.sha256_of(path)
  (entry,) = cache.iterdir()
  good = entry.read_bytes()
  entry.write_bytes(damage)
  assert digest.sha256_of(path) == expected
  assert entry.read_bytes() == good
  assert list(cache.iterdir()) == [entry]


def test_an_unwritable_cache_costs_only_time(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  (tmp_path / "file").touch()
  monkeypatch.setenv("NEUROJAX_CACHE_DIR", str(tmp_path / "file"))
  path = settled(tmp_path / "a", b"one")
  assert digest.sha256_of(path) == hashlib.sha256(b"one").hexdigest()


def test_absent(tmp_path: Path, cache: Path) -> None:
  with pytest.raises(FileNotFoundError):
    digest.sha256_of(tmp_path / "absent")

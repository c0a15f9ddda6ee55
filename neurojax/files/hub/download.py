"""Downloads a model from the hub into the cache: it goes on where it stopped, and is checked.

huggingface_hub throws away what came of a file when the process ends, so this keeps its own unfinished
files, beside the finished ones; the finished ones lie where huggingface_hub and other tools look.
"""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from neurojax.files import digest
from neurojax.files.hub import cache
from neurojax.files.hub.address import Address
from neurojax.files.hub.choice import choose, shards, size_text
from neurojax.files.hub.remote import Hub, RemoteFile

Progress = Callable[[str, int], None]
"""A function that is called with a file's name and the number of its bytes that have come."""

_CHUNK_BYTES = 1 << 20
# The hub's plain HTTP ends here; beyond it there is only its own protocol, Xet.
MOST_BYTES = 50_000_000_000
_MOST_INDEX_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class Pulled:
  """What a pull left in the cache.

  Attributes:
    path: What to open: a file, or a folder.
    files: All files of the model, with their paths.
    came_bytes: What came over the network this time.
  """

  address: Address
  commit: str
  path: Path
  files: tuple[tuple[RemoteFile, Path], ...]
  came_bytes: int


class Pull:
  """The download of one model. `files` are those known to be needed; weights with an index come last."""

  def __init__(self, hub: Hub, address: Address, folder: Path | None = None):
    """Ask the hub which files there are.

    Args:
      folder: The cache; where HF_HOME says if absent.
    Raises: as `Hub.listing`; as `choose`.
    """
    self._hub, self._address = hub, address
    self._cache = folder or cache.cache_folder()
    self._repo = cache.repo_folder(address, self._cache)
    self._blobs = self._repo / "blobs"
    self.commit, self._listing = hub.listing(address)
    sizes: dict[str, int | None] = {name: file.size_bytes for name, file in self._listing.items()}
    self._choice = choose(address.repo, sizes, address.file)
    self.files = [self._listing[name] for name in self._choice.files]
    self._snapshot = self._repo / "snapshots" / self.commit
    self.came_bytes = 0

  def run(self, *, progress: Progress | None = None, verify: bool = False) -> Pulled:
    """Download the files that are missing, and link them under their names.

    Args:
      verify: Also hash files that are there already.
    Raises:
      FileNotFoundError, PermissionError, ConnectionError: as `Hub.fetch`.
      ValueError: too little room; or a file is not what the hub lists, and was removed.
      NotImplementedError: a file is too large for plain HTTP.
    """
    self._get_all(self.files, progress, verify)
    if self._choice.index is not None:
      weights = self._shards(self._choice.index)
      self.files += weights
      self._get_all(weights, progress, verify)
    cache.remember(self._repo, self._address.revision, self.commit)
    files = tuple((file, self._snapshot / file.name) for file in self.files)
    path = self._snapshot / self._choice.opens
    return Pulled(self._address, self.commit, path, files, self.came_bytes)

  @property
  def has_index(self) -> bool:
    """Whether an index that is not read yet names weights beside `files`."""
    return self._choice.index is not None

  def missing_bytes(self, files: Iterable[RemoteFile]) -> int:
    """Bytes that would come over the network for these files."""
    missing = 0
    for file in {file.digest: file for file in files}.values():
      if not (self._blobs / file.digest).exists():
        missing += file.size_bytes - self._begin(file)
    return missing

  def _shards(self, index: str) -> list[RemoteFile]:
    if self._listing[index].size_bytes > _MOST_INDEX_BYTES:
      size = size_text(self._listing[index].size_bytes)
      raise ValueError(f"{self._address.repo}: {index} has {size}: that is no index")
    names = shards(self._address.repo, (self._snapshot / index).read_bytes(), self._listing)
    return [self._listing[name] for name in names]

  def _get_all(self, files: list[RemoteFile], progress: Progress | None, verify: bool) -> None:
    for file in files:
      if file.size_bytes > MOST_BYTES:
        raise NotImplementedError(
          f"{self._address.repo}: {file.name} has {size_text(file.size_bytes)}, and plain HTTP ends at "
          f"{size_text(MOST_BYTES)}: `hf download {self._address.repo} {file.name}` puts it into the "
          "same cache"
        )
    self._blobs.mkdir(parents=True, exist_ok=True)
    missing, free = self.missing_bytes(files), shutil.disk_usage(self._blobs).free
    if missing > free:
      raise ValueError(
        f"{size_text(missing)} are to come, and {self._blobs} has {size_text(free)} free: make room, or "
        "name another place in HF_HOME"
      )
    for file in files:
      self._get(file, progress, verify)

  def _get(self, file: RemoteFile, progress: Progress | None, verify: bool) -> None:
    from huggingface_hub.utils import WeakFileLock

    blob, pointer = self._blobs / file.digest, self._snapshot / file.name
    # The lock that huggingface_hub takes for the same file.
    lock = self._cache / ".locks" / self._repo.name / f"{file.digest}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
      is_here = blob.exists()
      if not is_here:
        self._fetch(file, progress)
        os.replace(self._partial(file), blob)
      elif verify or blob.stat().st_size != file.size_bytes:
        _check(blob, file)
      if file.sha256 is not None and (verify or not is_here):
        digest.remember(blob, file.sha256)
      if progress is not None:
        progress(file.name, file.size_bytes)
      if not pointer.exists() or pointer.resolve() != blob.resolve():
        cache.link(blob, pointer)

  def _fetch(self, file: RemoteFile, progress: Progress | None) -> None:
    begin, partial = self._begin(file), self._partial(file)
    with partial.open("r+b" if begin else "wb") as opened:
      opened.seek(begin)
      sink = _Sink(opened, file, progress)
      try:
        self._hub.fetch(self._address, self.commit, file, sink, begin)  # pyrefly: ignore
      except _TooMany:
        partial.unlink()
        raise
      finally:
        self.came_bytes += sink.came_bytes
        opened.flush()
        os.fsync(opened.fileno())
    _check(partial, file)

  def _begin(self, file: RemoteFile) -> int:
    """Bytes of an unfinished file that need not be downloaded again."""
    partial = self._partial(file)
    # A small file may come compressed, where a range means something else: from the start.
    if file.sha256 is None or not partial.exists():
      return 0
    size = partial.stat().st_size
    return size if size <= file.size_bytes else 0

  def _partial(self, file: RemoteFile) -> Path:
    # Not huggingface_hub's own name: what has that, it removes.
    return self._blobs / f"{file.digest}.neurojax.incomplete"


class _TooMany(ValueError):
  """More bytes came than were listed."""


class _Sink:
  """The file that `Hub.fetch` writes: it reports its progress, and refuses bytes beyond its size."""

  def __init__(self, file: BinaryIO, remote: RemoteFile, progress: Progress | None):
    self._file, self._remote, self._progress = file, remote, progress
    self.came_bytes = 0

  def write(self, data: bytes) -> int:
    here = self._file.tell() + len(data)
    if here > self._remote.size_bytes:
      raise _TooMany(
        f"{self._remote.name}: more bytes come than the {self._remote.size_bytes:,} that the hub lists: "
        "nothing of it was kept"
      )
    self._file.write(data)
    self.came_bytes += len(data)
    if self._progress is not None:
      self._progress(self._remote.name, here)
    return len(data)

  def seek(self, position: int) -> int:
    return self._file.seek(position)

  def tell(self) -> int:
    return self._file.tell()

  def truncate(self) -> int:
    return self._file.truncate()


def _check(path: Path, file: RemoteFile) -> None:
  """Remove a file whose digest is not the one that the hub lists. Raises: ValueError: it was removed."""
  size = path.stat().st_size
  found = f"{size:,} bytes of {file.size_bytes:,}"
  if size == file.size_bytes:
    with path.open("rb") as opened:
      digest_found = _git_sha1(opened, size) if file.sha256 is None else _sha256(opened)
    if digest_found == file.digest:
      return
    kind = "Git SHA-1" if file.sha256 is None else "SHA-256"
    found = f"its {kind} is {digest_found[:12]}..., not {file.digest[:12]}..."
  path.unlink()
  raise ValueError(
    f"{file.name}: what came is not what the hub lists ({found}): it was removed, pull again"
  )


def _sha256(file: BinaryIO) -> str:
  return hashlib.file_digest(file, "sha256").hexdigest()


def _git_sha1(file: BinaryIO, size_bytes: int) -> str:
  """Git's name for content: the SHA-1 of "blob SIZE", a zero byte, and the content."""
  hashed = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
  while part := file.read(_CHUNK_BYTES):
    hashed.update(part)
  return hashed.hexdigest()

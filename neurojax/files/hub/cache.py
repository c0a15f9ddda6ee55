"""Models of the hub on this machine, in the cache that huggingface_hub and other tools share.

models--ORG--NAME/refs/REVISION       the commit that a branch or tag had when it was pulled
models--ORG--NAME/snapshots/COMMIT/   the files' names, links to
models--ORG--NAME/blobs/DIGEST        the files; DIGEST is the SHA-256 of large ones, and Git's
                                      SHA-1 of others
"""

import contextlib
import os
import re
import tempfile
from pathlib import Path

from neurojax.files import digest
from neurojax.files.hub.address import Address
from neurojax.files.hub.choice import SeveralModels, choose, shards

SHA1 = re.compile("[0-9a-f]{40}")
SHA256 = re.compile("[0-9a-f]{64}")


def cache_folder() -> Path:
  """The folder HF_HUB_CACHE, or `hub` in HF_HOME, or ~/.cache/huggingface/hub."""
  from huggingface_hub import constants

  return Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
  """Whether HF_HUB_OFFLINE forbids asking the hub."""
  from huggingface_hub import constants

  return constants.is_offline_mode()


def repo_folder(address: Address, cache: Path) -> Path:
  """The folder of a repository in the cache."""
  return cache / ("models--" + address.repo.replace("/", "--"))


def repositories(cache: Path | None = None) -> list[str]:
  """The models ("org/name") of which the cache has a snapshot, in alphabetical order."""
  folders = (cache or cache_folder()).glob("models--*--*")
  return sorted(
    folder.name.removeprefix("models--").replace("--", "/", 1)
    for folder in folders
    if (folder / "snapshots").is_dir()
  )


def find(address: Address, cache: Path | None = None) -> Path:
  """The model in the cache: a file, or a folder for transformers. Nothing is downloaded.

  Raises:
    FileNotFoundError: it is not there, or not all of it.
    ValueError: several are; or a file is no longer what it was when it was pulled.
  """
  folder = repo_folder(address, cache or cache_folder())
  commit = _commit(folder, address.revision)
  if commit is None or not (snapshot := folder / "snapshots" / commit).is_dir():
    raise FileNotFoundError(f"{address} is not on this machine: {_remedy(address, folder)}")
  sizes = {
    path.relative_to(snapshot).as_posix(): path.stat().st_size
    for path in snapshot.rglob("*")
    if path.is_file()
  }
  try:
    choice = choose(str(address.repo), sizes, address.file)
    files = list(choice.files)
    if choice.index is not None:
      files += shards(address.repo, (snapshot / choice.index).read_bytes(), sizes)
  except SeveralModels:
    raise
  except (ValueError, NotImplementedError) as error:
    raise FileNotFoundError(
      f"not all of {address} is on this machine: {_remedy(address, folder)} ({error})"
    ) from error
  for name in files:
    check_unharmed(snapshot / name)
  return snapshot / choice.opens


def _remedy(address: Address, folder: Path) -> str:
  if is_offline():
    return (
      "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or copy the model to"
      f" {folder} from a machine that has it"
    )
  return f"`neurojax pull {address}` gets it"


def _commit(folder: Path, revision: str) -> str | None:
  if SHA1.fullmatch(revision):
    return revision
  with contextlib.suppress(OSError, UnicodeDecodeError):
    commit = (folder / "refs" / revision).read_text().strip()
    if SHA1.fullmatch(commit):
      return commit
  return None


def check_unharmed(path: Path) -> None:
  """Check that a file that was pulled still has the digest that it had.

  This reads the file only if it was written since. Files that another tool downloaded are not checked.

  Raises: ValueError: the file has another digest.
  """
  expected = blob_name(path)
  if expected is None or not SHA256.fullmatch(expected) or not digest.is_known(path):
    return
  if digest.sha256_of(path) != expected:
    raise ValueError(
      f"{path}: it was changed since it was downloaded (its SHA-256 should begin with {expected[:12]}): "
      f"remove {path.resolve()} and pull it again"
    )


def blob_name(path: Path) -> str | None:
  """The digest that a file of a snapshot should have: the name that its link points to."""
  return Path(os.readlink(path)).name if path.is_symlink() else None


def link(blob: Path, pointer: Path) -> None:
  """Make a snapshot's name for a blob: a relative link, so that the cache can be moved."""
  pointer.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=pointer.parent, prefix=".link-") as folder:
    made = Path(folder) / "link"
    try:
      os.symlink(os.path.relpath(blob, pointer.parent), made)
    except OSError:
      os.link(blob, made)
    os.replace(made, pointer)


def remember(folder: Path, revision: str, commit: str) -> None:
  """Note the commit of a branch or tag."""
  if revision == commit:
    return
  ref = folder / "refs" / revision
  ref.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=ref.parent, prefix=".ref-")
  with os.fdopen(handle, "w") as file:
    file.write(commit)
  os.chmod(temporary, 0o644)
  os.replace(temporary, ref)

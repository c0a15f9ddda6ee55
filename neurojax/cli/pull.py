"""`neurojax pull` downloads a model from the hub."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import (
  BarColumn,
  DownloadColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
  TransferSpeedColumn,
)
from rich.table import Table

from neurojax.cli.console import stderr
from neurojax.files.find import INSTALLED, model_path

if TYPE_CHECKING:
  from neurojax.files.hub.address import Address
  from neurojax.files.hub.download import Pull, Pulled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pulling:
  """Download a model from the hub, and print where it lies.

  MODEL is org/name, with @revision and :file if needed, or a short name (--list). :file is the name
  of a file, or a quantization as file names spell it (:Q4_K_M), or "safetensors". All parts of a
  GGUF model are downloaded; with safetensors, the configuration and the tokenizer too; never code.
  Other verbs take the same MODEL afterwards; none of them downloads.

  An interrupted download continues where it stopped, and every file is compared with the digest
  that the hub lists. Models lie in the cache that other tools share (HF_HOME). A gated model needs
  the token of an account that agreed to its terms: HF_TOKEN, or `hf auth login`. HF_ENDPOINT names
  another hub; HF_HUB_OFFLINE=1 asks none.

  Example: neurojax pull prism-ml/Ternary-Bonsai-1.7B-gguf:Q2_0
  Example: neurojax generate --model "$(neurojax pull bonsai-1.7b)" --prompt "The sea"
  """

  model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
  """org/name[@revision][:file], a short name, or the address of a page of the hub."""
  verify: bool = False
  """Also compare files that are here already with the hub's digests."""
  dry_run: bool = False
  """Print what would be downloaded, and stop."""
  list: bool = False
  """Print the short names, and which of the models are here."""
  json: bool = False
  """Print one JSON object."""

  def run(self) -> int:
    if self.list:
      if self.model is not None:
        raise ValueError("--list names all short names: leave the model away")
      return self._list()
    if self.model is None:
      raise ValueError("name a model: org/name, or a short name (`neurojax pull --list`)")
    if self.model in INSTALLED:
      path = model_path(self.model)
      stderr.print(f"{self.model} is installed: nothing to download", highlight=False)
      return self._told({"model": self.model, "path": str(path), "came_bytes": 0}, path)
    from neurojax.files.hub import cache
    from neurojax.files.hub.address import Address

    address = Address.parse(self.model)
    if address is None:
      raise ValueError(
        f"{self.model!r} is no model on the hub: org/name[@revision][:file], or a short name "
        "(`neurojax pull --list`)"
      )
    if cache.is_offline():
      path = cache.find(address)
      stderr.print("HF_HUB_OFFLINE is set: the hub was not asked", highlight=False)
      return self._told(_found(address, path), path)
    return self._pull(address)

  def _pull(self, address: "Address") -> int:
    from neurojax.files.hub import cache
    from neurojax.files.hub.download import Pull
    from neurojax.files.hub.remote import Hub

    try:
      with stderr.status(f"asking the hub for {address.repo}"):
        pull = Pull(Hub(), address)
    except ConnectionError as error:
      try:
        path = cache.find(address)
      except FileNotFoundError:
        raise error from None
      stderr.print(
        f"{error}\n{address} is here as it was pulled before", highlight=False, markup=False
      )
      return self._told(_found(address, path), path)
    if self.dry_run:
      return self._would(pull)
    done = _with_progress(pull, verify=self.verify)
    return self._told(_description(done), done.path)

  def _would(self, pull: "Pull") -> int:
    from neurojax.files.hub.choice import size_text

    missing = pull.missing_bytes(pull.files)
    if self.json:
      files = [{"name": file.name, "size_bytes": file.size_bytes} for file in pull.files]
      print(json.dumps({"commit": pull.commit, "files": files, "missing_bytes": missing}))
      return 0
    for file in pull.files:
      print(f"{file.name}  {size_text(file.size_bytes)}")
    more = ", and the weights that the index names" if pull.has_index else ""
    print(f"{size_text(missing)} would come{more}")
    return 0

  def _told(self, description: dict[str, object], path: Path) -> int:
    print(json.dumps(description, ensure_ascii=False) if self.json else path)
    return 0

  def _list(self) -> int:
    from neurojax.files.hub import cache
    from neurojax.files.hub.address import ALIASES, Address

    rows = {}
    for name, target in ALIASES.items():
      address = Address.parse(target)
      assert address is not None
      try:
        rows[name] = (target, str(cache.find(address)))
      except (FileNotFoundError, ValueError):
        rows[name] = (target, None)
    if self.json:
      table = {name: {"model": target, "path": path} for name, (target, path) in rows.items()}
      print(json.dumps(table, indent=1))
      return 0
    table = Table(box=None, pad_edge=False)
    for title in ("name", "model", "here"):
      table.add_column(title)
    for name, (target, path) in rows.items():
      table.add_row(name, target, "yes" if path else "")
    Console(highlight=False).print(table)
    return 0


def _with_progress(pull: "Pull", *, verify: bool) -> "Pulled":
  if not sys.stderr.isatty():
    said: set[str] = set()

    def say(name: str, here: int) -> None:
      if name not in said:
        said.add(name)
        print(f"{name}", file=sys.stderr)

    return pull.run(progress=say, verify=verify)
  columns = (
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
  )
  with Progress(*columns, console=stderr) as progress:
    bars = {}

    def show(name: str, here: int) -> None:
      if name not in bars:
        sizes = {file.name: file.size_bytes for file in pull.files}
        bars[name] = progress.add_task(name, total=sizes[name], completed=here)
      progress.update(bars[name], completed=here)

    return pull.run(progress=show, verify=verify)


def _description(done: "Pulled") -> dict[str, object]:
  files = [
    {"name": file.name, "path": str(path), "size_bytes": file.size_bytes, "sha256": file.sha256}
    for file, path in done.files
  ]
  return {
    "model": done.address.repo,
    "revision": done.address.revision,
    "commit": done.commit,
    "path": str(done.path),
    "files": files,
    "came_bytes": done.came_bytes,
    "asked_hub": True,
  }


def _found(address: "Address", path: Path) -> dict[str, object]:
  return {
    "model": address.repo,
    "revision": address.revision,
    "path": str(path),
    "came_bytes": 0,
    "asked_hub": False,
  }

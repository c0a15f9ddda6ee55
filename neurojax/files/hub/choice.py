"""Chooses the files of a repository that make up a model."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

INDEX = "model.safetensors.index.json"
_SAFETENSORS = "safetensors"

# Files that the reader of a transformers folder may open. Code and pickles are never among them.
_BESIDE = (
  "config.json", "generation_config.json", "quantize_config.json", "quant_config.json",
  "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
  "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_RUNS_CODE = re.compile(
  r"(?i).*(\.py|\.pyc|\.so|\.sh|\.pt|\.pth|\.pkl|\.pickle|\.ckpt|\.h5|\.msgpack|\.onnx)"
  r"|(.*/)?(pytorch_model|training_args|optimizer|scheduler).*\.bin"
)
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.(?P<kind>gguf|safetensors)")
# Beside a model, not one: projectors of images, matrices of importance.
_NO_MODEL = re.compile(r"(?i)(^|[-._])(mmproj|imatrix)([-._]|$)")
_MOST_NAMED = 40


@dataclasses.dataclass(frozen=True)
class Choice:
  """The files of one model.

  Attributes:
    files: Names of the files, metadata first. Weights that an index lists are not among them: `shards`
      names those.
    opens: The file to open; "" is the folder itself.
    index: The file that names the weights' files, if there is one.
  """

  files: tuple[str, ...]
  opens: str
  index: str | None = None


class SeveralModels(ValueError):
  """More than one model fits; they are listed."""


def choose(where: str, sizes: Mapping[str, int | None], wanted: str | None) -> Choice:
  """The model that is meant, from the files that there are.

  Args:
    where: The repository, for errors.
    sizes: Bytes of each file, None where unknown.
    wanted: A file's name, a quantization as the names of GGUF files spell it ("Q4_K_M"; case does not
      matter), "safetensors", or None.
  Raises:
    ValueError: there is none, or several; they are listed.
    NotImplementedError: what there is would have to be unpickled or run.
  """
  models = _gguf_models(sizes)
  folder = _folder(sizes)
  if wanted is None:
    if len(models) == 1 and folder is None:
      return _gguf(where, *models.items(), sizes)
    if folder is not None and not models:
      return folder
    if models or folder is not None:
      raise SeveralModels(_several(where, models, folder, sizes))
    raise _none(where, sizes)
  if wanted in sizes:
    return _named(where, wanted, sizes)
  if wanted.lower() == _SAFETENSORS and folder is not None:
    return folder
  word = re.compile(rf"(?i)(^|[-._/]){re.escape(wanted)}([-./]|$)")
  meant = {name: parts for name, parts in models.items() if word.search(name)}
  if len(meant) == 1:
    return _gguf(where, *meant.items(), sizes)
  if meant:
    raise SeveralModels(_several(where, meant, None, sizes))
  raise ValueError(
    f"{where} has no file {wanted!r} and no GGUF model of that quantization; it has:\n"
    + _listed(sizes)
  )


def shards(where: str, index: bytes, names: Sequence[str] | Mapping[str, object]) -> list[str]:
  """The weights' files that an index names.

  Raises: ValueError: it is no index, or names files that are not there.
  """
  try:
    table = json.loads(index)
    found = sorted(set(table["weight_map"].values()))
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(f"{where}: {INDEX} is no index of weights: {error!r}") from error
  wrong = [
    name
    for name in found
    if not isinstance(name, str) or not name.endswith(f".{_SAFETENSORS}") or name not in names
  ]
  if wrong or not found:
    raise ValueError(f"{where}: {INDEX} names files that are not there: {wrong[:5]}")
  return found


def _gguf_models(sizes: Mapping[str, object]) -> dict[str, list[str]]:
  """The files of each GGUF model, under the name of the first."""
  models: dict[str, list[str]] = {}
  for name in sorted(sizes):
    if not name.lower().endswith(".gguf") or _NO_MODEL.search(name.rpartition("/")[2]):
      continue
    part = _PART.fullmatch(name)
    first = name if part is None else f"{part['stem']}-00001-of-{part['parts']}.gguf"
    models.setdefault(first, []).append(name)
  return models


def _gguf(where: str, model: tuple[str, list[str]], sizes: Mapping[str, object]) -> Choice:
  first, files = model
  part = _PART.fullmatch(first)
  if part is not None and len(files) != int(part["parts"]):
    here = {match["part"] for name in files if (match := _PART.fullmatch(name))}
    missing = [n for n in range(1, int(part["parts"]) + 1) if f"{n:05}" not in here]
    raise ValueError(
      f"{where}: {first} has {part['parts']} parts, of which {len(files)} are there; "
      f"missing: {', '.join(map(str, missing[:10]))}"
    )
  return Choice(tuple(files), first)


def _named(where: str, name: str, sizes: Mapping[str, object]) -> Choice:
  if _RUNS_CODE.fullmatch(name):
    raise NotImplementedError(
      f"{where}: {name} is code, or can run code when it is loaded: take GGUF or safetensors"
    )
  part = _PART.fullmatch(name)
  if name.lower().endswith(".gguf"):
    first = name if part is None else f"{part['stem']}-00001-of-{part['parts']}.gguf"
    files = [
      other
      for other in sorted(sizes)
      if other == name or (part is not None and _same_set(part, _PART.fullmatch(other)))
    ]
    return _gguf(where, (first, files), sizes)
  if name.endswith(f".{_SAFETENSORS}") and "/" not in name:
    folder = _folder(sizes)
    if folder is not None and (folder.index is not None or name in folder.files):
      return folder
    return Choice((*_beside(sizes), name), "")
  return Choice((name,), name)


def _same_set(part: re.Match[str], other: re.Match[str] | None) -> bool:
  return other is not None and all(part[key] == other[key] for key in ("stem", "parts", "kind"))


def _beside(sizes: Mapping[str, object]) -> tuple[str, ...]:
  return tuple(name for name in _BESIDE if name in sizes)


def _folder(sizes: Mapping[str, object]) -> Choice | None:
  """A model in the layout of transformers, with safetensors at the top of the repository."""
  if "config.json" not in sizes:
    return None
  beside = _beside(sizes)
  if INDEX in sizes:
    return Choice((*beside, INDEX), "", INDEX)
  weights = [
    name
    for name in sorted(sizes)
    if name.endswith(f".{_SAFETENSORS}") and "/" not in name and not name.startswith("adapter")
  ]
  if "model.safetensors" in weights:
    weights = ["model.safetensors"]
  if len(weights) != 1:
    return None
  return Choice((*beside, *weights), "")


def _several(
  where: str,
  models: Mapping[str, Sequence[str]],
  folder: Choice | None,
  sizes: Mapping[str, int | None],
) -> str:
  total = {
    first: None if None in (parts := [sizes[name] for name in files]) else sum(parts)  # pyrefly: ignore
    for first, files in models.items()
  }
  rows = _listed(total)
  if folder is not None:
    rows += f"\n  {_SAFETENSORS}  (a folder for transformers)"
  return (
    f"{where} has several models: say which, as {where}:FILE or by a part of its name that no other has "
    f"(:Q4_K_M, for example):\n{rows}"
  )


def _none(where: str, sizes: Mapping[str, int | None]) -> Exception:
  listed = f"; it has:\n{_listed(sizes)}" if sizes else "; it is empty"
  if any(_RUNS_CODE.fullmatch(name) for name in sizes):
    return NotImplementedError(
      f"{where} has neither GGUF nor safetensors, only weights that can run code when they are "
      f"loaded: look for a converted copy of it{listed}"
    )
  return ValueError(
    f"{where} has no model that is read here (GGUF, or config.json with safetensors){listed}"
  )


def _listed(sizes: Mapping[str, int | None]) -> str:
  names = sorted(sizes)
  rows = [
    f"  {name}" + ("" if (size := sizes[name]) is None else f"  {size_text(size)}")
    for name in names[:_MOST_NAMED]
  ]
  if len(names) > _MOST_NAMED:
    rows.append(f"  and {len(names) - _MOST_NAMED} more")
  return "\n".join(rows)


def size_text(size_bytes: int) -> str:
  """ "2.18 GB", in powers of 1000, as hubs and disks count."""
  for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
    if size_bytes >= 10**power:
      return (
        f"{size_bytes / 10**power:.3g} {unit}"
        if size_bytes < 10 ** (power + 3)
        else (f"{size_bytes / 10**power:,.0f} {unit}")
      )
  return f"{size_bytes} bytes"

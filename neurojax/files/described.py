"""What a model's name stands for, as far as planning needs it: its architecture and the forms of its file."""

import dataclasses
from pathlib import Path
from typing import Literal

from neurojax import count
from neurojax.config import Activations, ModelConfig, architectures
from neurojax.files.find import model_path
from neurojax.forms import TERNARY_FORMATS, Forms, Weights


@dataclasses.dataclass(frozen=True)
class Described:
  """An architecture, and how a file holds its matrices.

  Attributes:
    forms: Forms of the matrices by canonical name; None where there is no file and none were asked for.
    activations: Type of activations that the file is made for; None: not said.
  """

  config: ModelConfig
  forms: Forms | None = None
  activations: Activations | None = None


def described(
  model: str | Path,
  *,
  weights: Weights | Literal["auto"] = "auto",
  ternary: str = "ternary-g128",
) -> Described:
  """Describe an architecture of configs/model, the TOML file of one, or a model file. Loads no weights.

  Args:
    weights: How the model is to be held. "w2a8" and "w2a16" make every matrix of an architecture without
      a file ternary.
    ternary: How the scales of such an architecture lie: a name in `forms.TERNARY_FORMATS`.
  Raises: ValueError: no such architecture, model or format.
  """
  name = str(model)
  if name in architectures() or Path(name).suffix == ".toml":
    config = ModelConfig.named(name)
    if weights not in ("w2a16", "w2a8"):
      return Described(config)
    if ternary not in TERNARY_FORMATS:
      raise ValueError(f"ternary {ternary!r}: choose one of {', '.join(TERNARY_FORMATS)}")
    return Described(config, count.uniform_ternary(config, TERNARY_FORMATS[ternary]))
  from neurojax.files.kept import stored_forms
  from neurojax.files.open import open_model

  try:
    path = model_path(name)
    if not path.exists():
      raise FileNotFoundError(f"{name}: no such file")
  except FileNotFoundError as error:
    known = ", ".join(architectures())
    short = name if len(name) <= 60 else f"{name[:60]}..."
    reason = str(error).removeprefix(f"{short}: ")
    raise ValueError(
      f"model {short!r}: {reason}; and no architecture of this name: {known}"
    ) from error
  with open_model(path) as file:
    return Described(file.config, stored_forms(file), getattr(file, "activations", None))

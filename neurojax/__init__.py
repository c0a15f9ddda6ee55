"""Ternary language models in JAX: sized, trained, packed, cut into stages and run across machines.

    import neurojax as nj

    model = nj.load("neurollm")
    print(model.generate("The sea was", max_tokens=40, temperature=0.8, seed=7))

Importing the package loads no JAX; each name is loaded when it is first used.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
  from neurojax.api.model import AsyncModel as AsyncModel
  from neurojax.api.model import Model as Model
  from neurojax.api.model import connect as connect
  from neurojax.api.model import load as load
  from neurojax.api.opening import Progress as Progress
  from neurojax.api.results import Completion as Completion
  from neurojax.api.results import Piece as Piece
  from neurojax.api.results import Report as Report
  from neurojax.api.results import Score as Score
  from neurojax.api.work import convert as convert
  from neurojax.api.work import export as export
  from neurojax.api.work import inspect as inspect
  from neurojax.api.work import plan as plan
  from neurojax.api.work import quantize as quantize
  from neurojax.api.work import simulate as simulate
  from neurojax.api.work import size as size
  from neurojax.api.work import ternary_matmul as ternary_matmul
  from neurojax.api.work import train as train
  from neurojax.config import ModelConfig as ModelConfig
  from neurojax.config import Sampling as Sampling
  from neurojax.config import Serving as Serving
  from neurojax.engine.api import EngineError as EngineError
  from neurojax.plan.fleet import Fleet as Fleet
  from neurojax.plan.plan import Plan as Plan
  from neurojax.tokenizer import Tokenizer as Tokenizer
  from neurojax.train.config import TrainConfig as TrainConfig
  from neurojax.weights.ternary import TernaryArray as TernaryArray

_HOMES = {
  "AsyncModel": "api.model",
  "Completion": "api.results",
  "EngineError": "engine.api",
  "Fleet": "plan.fleet",
  "Model": "api.model",
  "ModelConfig": "config",
  "Piece": "api.results",
  "Plan": "plan.plan",
  "Progress": "api.opening",
  "Report": "api.results",
  "Sampling": "config",
  "Score": "api.results",
  "Serving": "config",
  "TernaryArray": "weights.ternary",
  "Tokenizer": "tokenizer",
  "TrainConfig": "train.config",
  "connect": "api.model",
  "convert": "api.work",
  "export": "api.work",
  "inspect": "api.work",
  "load": "api.model",
  "quantize": "api.work",
  "simulate": "api.work",
  "size": "api.work",
  "ternary_matmul": "api.work",
}
"""Public names by the module that defines them."""

_VERBS = ("plan", "train")
"""Rooms of the package that are functions of the face too: `neurojax.plan(...)`."""

__all__ = sorted([*_HOMES, *_VERBS, "__version__"])


def __getattr__(name: str) -> Any:
  if name in _VERBS:
    return importlib.import_module(f"{__name__}.{name}")
  if name not in _HOMES:
    raise AttributeError(f"module 'neurojax' has no attribute {name!r}")
  value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})


class _Verb(types.ModuleType):
  """A room that can be called: Python puts `neurojax.plan`, the room, where the function would be."""

  @property
  def _function(self) -> Any:
    work = importlib.import_module("neurojax.api.work")
    return getattr(work, self.__name__.rpartition(".")[2])

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._function(*args, **kwargs)

  @property
  def __doc__(self) -> str:  # type: ignore[override]
    return f"{self.__name__}{self.__signature__}\n\n{self._function.__doc__}"

  def __repr__(self) -> str:
    return f"<{self.__name__}: function and package>"

  @property
  def __signature__(self) -> Any:
    return importlib.import_module("inspect").signature(self._function)


class _Face(types.ModuleType):
  """The package: importing one of the verbs' rooms makes it callable."""

  def __setattr__(self, name: str, value: Any) -> None:
    if name in _VERBS and isinstance(value, types.ModuleType):
      value.__class__ = _Verb
    super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face

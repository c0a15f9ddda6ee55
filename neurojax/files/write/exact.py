"""Checks that hold an export to its promise: ternary matrices keep their numbers, or it is refused."""

from collections.abc import Iterable

from neurojax.config import ModelConfig
from neurojax.files.weight_source import WeightSource
from neurojax.files.write.packing import TYPES, check, choose
from neurojax.files.write.tensors import DTYPES, Place, is_ternary
from neurojax.forms import Scales


def check_parts(config: ModelConfig, reader: str) -> None:
  """Check that a reader ("GGUF", "transformers") has an architecture with a trained model's parts.

  Raises: ValueError: it has none; the message says how to train instead.
  """
  if not config.sub_norm:
    return
  if config.qk_norm:
    raise ValueError(f"sub_norm and qk_norm: no architecture of {reader} has both: train with one")
  if not config.tied_embedding and reader == "GGUF":
    raise ValueError(
      "sub_norm without tied_embedding: llama.cpp's bitnet has no head beside the embedding: train"
      " with tied_embedding = true"
    )
  if config.num_heads * config.head_dim != config.model_dim:
    theirs = "llama.cpp's bitnet" if reader == "GGUF" else "transformers' BitNet"
    raise ValueError(
      f"num_heads * head_dim = {config.num_heads * config.head_dim}, model_dim ="
      f" {config.model_dim}: {theirs} wants them equal: train with head_dim = model_dim / num_heads"
    )


def ternary_type(
  source: WeightSource, places: Iterable[Place], kind: str | None, outer: str | None
) -> str | None:
  """The GGUF type that ternary matrices get where none is asked for; None: there is no such matrix.

  Args:
    kind: The type that is asked for, for matrices of layers.
    outer: The same for embedding and head.
  Raises: ValueError: a type that is no ternary or plain one, or that does not hold a matrix.
  """
  for wanted in (kind, outer):
    if wanted is not None and wanted not in TYPES and wanted not in DTYPES:
      raise ValueError(f"type {wanted!r}: choose one of {', '.join([*TYPES, *DTYPES])}")
  rows: dict[str, tuple[int, int | None]] = {}
  free = {}
  for place in places:
    if not is_ternary(source, place) or place.name in rows:
      continue
    form = source.narrow_form(place.name, place.layer)
    assert isinstance(form, Scales)
    rows[place.name] = place.shape(source.config)[-1], form.group_size
    wanted = outer if place.layer is None else kind
    if wanted is None:
      free[place.name] = rows[place.name]
    elif wanted in TYPES:
      check(*rows[place.name], TYPES[wanted], place.name)
  asked = next((wanted for wanted in (kind, outer) if wanted in TYPES), None)
  if asked is not None and not rows:
    raise ValueError(f"type {asked!r}: the model has no ternary matrix: leave the type away")
  return choose(free) if free else None

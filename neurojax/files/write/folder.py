"""Writes any source as a folder that transformers loads: exactly, or in a dtype that is asked for."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neurojax.config import ModelConfig
from neurojax.files import names
from neurojax.files.folder.card import BESIDE, README, write_card
from neurojax.files.open import open_model
from neurojax.files.weight_source import WeightSource
from neurojax.files.write import exact
from neurojax.files.write.gguf import check_folder, check_new
from neurojax.files.write.safetensors import Dtype, write_safetensors
from neurojax.files.write.tensors import (
  DTYPES,
  NO_LICENSE,
  Converted,
  Loss,
  Place,
  holds,
  narrowest,
  numbers,
  places,
  rounded,
)
from neurojax.files.write.transformers_config import alike, config_json, folder_places
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from neurojax.tokenizer.write.gguf import padded
from neurojax.tokenizer.write.tokenizer_json import json_from_spec
from neurojax.tokenizer.write.tokenizer_model import sentencepiece_from_spec

KINDS: Mapping[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TOKENIZER_FILES = (
  "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
  "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
  "vocab.json", "merges.txt",
)  # fmt: skip
FILES = ("config.json", "model.safetensors", *_TOKENIZER_FILES, *BESIDE)
"""Every file that a folder may have which was written here."""


def to_folder(
  source: WeightSource,
  folder: Path,
  *,
  kind: str | None = None,
  is_exact: bool = False,
  overwrite: bool = False,
  general: Mapping[str, str] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Converted:
  """Write config.json, model.safetensors, README.md and the tokenizer's files. The folder appears whole
  or not at all, after our reader has opened it once. Quantized matrices become plain numbers.

  Args:
    kind: One of KINDS, for all tensors. None: each in its own, or the narrowest that changes nothing.
    is_exact: One dtype for all tensors that changes no number: BF16 or F32 if `kind` is None, and a
      `kind` that would change one is refused.
    overwrite: Replace an empty folder, or one in which all files are of those written here.
    general: Keys such as "general.name" to set, which GGUF files have. They and those of the source
      stand in the header of model.safetensors, and licence and description in README.md.
    progress: Called with the number of tensors written so far and of all.
  Raises:
    FileExistsError: something is there.
    ValueError: transformers has no family with these parts, a number is NaN or infinite or, if
      `is_exact`, not exact in the dtype; and what reading raises.
    NotImplementedError: the tokenizer cannot be written in this format; and what reading raises.
  """
  if kind is not None and kind not in KINDS:
    raise ValueError(f"type {kind!r}: a folder holds {', '.join(KINDS)}")
  if overwrite:
    _check_ours(folder)
  else:
    check_new(folder)
  check_folder(folder.parent)
  source.check()
  if is_exact:
    exact.check_parts(source.config, "transformers")
  config = dataclasses.replace(source.config, rope_style="half")
  table = config_json(config)
  model_type = str(table["model_type"])
  all_places = list(places(folder_places(model_type, config), config.num_experts))
  if is_exact:
    kinds = dict.fromkeys(
      (place.file_name for place in all_places), _exact_kind(source, all_places, kind)
    )
  else:
    kinds = {place.file_name: kind or _own_kind(source, place) for place in all_places}
  said = {**source.card, **(general or {})}
  dtype = KINDS[_widest(kinds.values())]
  table |= {"dtype": dtype, "torch_dtype": dtype, **special_ids(source.tokenizer)}
  if name := said.get("general.name"):
    table["_name_or_path"] = name
  if source.activations is not None:
    table[names.FOLDER_ACTIVATIONS] = source.activations
  loss = Loss()

  def tensors() -> Iterator[np.ndarray]:
    for done, place in enumerate(all_places, 1):
      yield _encoded(source, place, kinds[place.file_name], loss)
      if progress:
        progress(done, len(all_places))

  temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
  temporary.mkdir()
  try:
    (temporary / "config.json").write_text(_pretty(table), encoding="utf-8")
    _write_tokenizer(source, temporary)
    _write_card(source, temporary, said, is_changed=bool(general))
    write_safetensors(
      temporary / "model.safetensors",
      {place.file_name: place.shape(config) for place in all_places},
      tensors(),
      {name: KINDS[own] for name, own in kinds.items()},
      {"format": "pt", **{k: v for k, v in said.items() if k != "general.architecture"}},
    )
    _verify(source, temporary)
    _rename(temporary, folder, overwrite=overwrite)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  counts: dict[str, int] = {}
  for own in kinds.values():
    counts[own] = counts.get(own, 0) + 1
  notes = () if "general.license" in said else (NO_LICENSE,)
  return Converted(model_type, _widest(kinds.values()), counts, loss, notes)


def _check_ours(folder: Path) -> None:
  """Raises: FileExistsError: something is there that was not written here."""
  if not folder.is_dir():
    return check_new(folder)
  if more := sorted(path.name for path in folder.iterdir() if path.name not in FILES):
    raise FileExistsError(f"{folder}: {more[0]} is of no export: name another folder")
  return None


def _rename(temporary: Path, folder: Path, *, overwrite: bool) -> None:
  """Give the new folder its name. An old one steps aside first, and comes back if that fails."""
  if not overwrite or not folder.is_dir():
    # Fails where somebody has put something else meanwhile.
    os.rename(temporary, folder)
    return
  old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
  os.rename(folder, old)
  try:
    os.rename(temporary, folder)
  except OSError:
    os.rename(old, folder)
    raise
  shutil.rmtree(old, ignore_errors=True)


def _exact_kind(source: WeightSource, all_places: list[Place], kind: str | None) -> str:
  """The type that changes no number. Raises: ValueError: the `kind` that is asked for changes one."""
  if kind == "F32":
    return kind
  for place in all_places:
    if not holds(numbers(source, place, "half"), kind or "BF16"):
      if kind is not None:
        raise ValueError(f"{place.title} is not exact in {KINDS[kind]}: choose float32")
      return "F32"
  return kind or "BF16"


def _own_kind(source: WeightSource, place: Place) -> str:
  values = numbers(source, place, "half")
  own = next((name for name, dtype in DTYPES.items() if values.dtype == dtype), "F32")
  # Norms of a GGUF file are float32, whatever they were.
  return narrowest(values) if own == "F32" else own


def _widest(kinds) -> str:
  found = set(kinds)
  return found.pop() if len(found) == 1 else "F32"


def _encoded(source: WeightSource, place: Place, kind: str, loss: Loss) -> np.ndarray:
  values = numbers(source, place, "half")
  made = rounded(values, kind, place.file_name)
  loss.add(place.file_name, values, made)
  return made


def _write_card(
  source: WeightSource, folder: Path, said: Mapping[str, str], *, is_changed: bool
) -> None:
  """The model card and licence of a folder as they are; a new card where something was changed."""
  if source.format == "huggingface":
    for name in BESIDE:
      if (source.path / name).is_file() and not (name == README and is_changed):
        shutil.copyfile(source.path / name, folder / name)
  if not (folder / README).exists() and (text := write_card(said)):
    (folder / README).write_text(text, encoding="utf-8")


def _write_tokenizer(source: WeightSource, folder: Path) -> None:
  """The tokenizer files of a folder as they are; another tokenizer in the files that hold its kind."""
  if source.format == "huggingface":
    for name in _TOKENIZER_FILES:
      if (source.path / name).is_file():
        shutil.copyfile(source.path / name, folder / name)
    return
  spec = source.tokenizer
  (folder / "generation_config.json").write_text(_pretty(special_ids(spec)), encoding="utf-8")
  if spec is None:
    return
  table = tokenizer_config(spec, source.config)
  if spec.kind in ("spm", "sentencepiece"):
    (folder / "tokenizer.model").write_bytes(sentencepiece_from_spec(spec))
    table |= _spm_config(spec)
  else:
    text = json_from_spec(padded(spec, source.config.vocab_size))
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
  (folder / "tokenizer_config.json").write_text(_pretty(table), encoding="utf-8")


def special_ids(tokenizer: TokenizerSpec | None) -> dict[str, Any]:
  """The ids of special tokens. Without a tokenizer they are null, which overrides a class's defaults."""
  ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
  if tokenizer is not None:
    stops = sorted(tokenizer.stop_ids)
    ids["bos_token_id"] = tokenizer.bos_id
    ids["eos_token_id"] = stops if len(stops) > 1 else tokenizer.eos_id
  return ids


def tokenizer_config(spec: TokenizerSpec, config: ModelConfig) -> dict[str, Any]:
  """The tokenizer_config.json of a vocabulary, without the entries of a SentencePiece model."""

  def spelled(token_id: int | None) -> str | None:
    return None if token_id is None else spec.tokens[token_id]

  table = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": spelled(spec.bos_id),
    "eos_token": spelled(spec.eos_id),
    "unk_token": spelled(spec.unknown_id),
    "model_max_length": config.context_length,
    "clean_up_tokenization_spaces": False,
    "chat_template": spec.chat_template,
  }
  return {key: value for key, value in table.items() if value is not None}


def _spm_config(spec: TokenizerSpec) -> dict[str, Any]:
  return {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": False,
    "add_bos_token": spec.add_bos,
    "add_eos_token": spec.add_eos,
    "add_prefix_space": spec.add_space_prefix,
    "added_tokens_decoder": {
      str(i): {
        "content": token, "lstrip": i in spec.strip_before_ids, "rstrip": i in spec.strip_after_ids,
        "normalized": False, "single_word": False, "special": spec.types[i] != "user",
      }
      for i, token in enumerate(spec.tokens) if spec.types[i] in ("control", "unknown", "user")
    },
  }  # fmt: skip


def _pretty(table: Mapping[str, Any]) -> str:
  return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def _verify(source: WeightSource, folder: Path) -> None:
  """Check that our reader finds the same model in the new folder."""
  with open_model(folder) as made:
    made.check()
    wanted = names.in_words(dataclasses.replace(source.config, rope_style="half"))
    if not alike(names.in_words(made.config), wanted):
      raise AssertionError(f"wrote {wanted}, read {made.config}")

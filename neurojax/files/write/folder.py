"""Any model file to a folder that transformers loads: exactly, or in a dtype that is asked for."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neurojax.files import names
from neurojax.files.model_file import ModelFile
from neurojax.files.open import open_model
from neurojax.files.write.gguf import Converted
from neurojax.files.write.safetensors import Dtype, write_safetensors
from neurojax.files.write.tensors import DTYPES, Loss, Place, narrowest, numbers, places
from neurojax.files.write.trained_folder import special_ids, tokenizer_config
from neurojax.files.write.transformers_config import alike, config_json, huggingface_places
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


def to_huggingface(
  file: ModelFile,
  folder: Path,
  *,
  kind: str | None = None,
  general: dict[str, str] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Converted:
  """Write config.json, model.safetensors and the tokenizer's files; the folder appears whole or not at
  all, and has been opened once by our reader. Quantized matrices become plain numbers.

  Args:
    kind: Of all tensors, one of KINDS; None: each in its own, or the narrowest that changes nothing.
    general: Keys such as "general.name", which GGUF files have, to set; they and those that the file has
      stand in the header of model.safetensors.
  Raises:
    FileExistsError: something is there.
    ValueError: transformers has no family with these parts; and what reading raises.
    NotImplementedError: the tokenizer cannot be written in this format; and what reading raises.
  """
  if kind is not None and kind not in KINDS:
    raise ValueError(f"type {kind!r}: a folder holds {', '.join(KINDS)}")
  if folder.exists() or folder.is_symlink():
    raise FileExistsError(f"{folder} exists: name another, or remove it first")
  if not folder.parent.is_dir():
    raise FileNotFoundError(f"{folder.parent}: no such folder: make it first")
  file.check()
  config = dataclasses.replace(file.config, rope_style="half")
  table = config_json(config)
  model_type = str(table["model_type"])
  all_places = list(places(huggingface_places(model_type, config), config.num_experts))
  kinds = {place.file_name: kind or _own(file, place) for place in all_places}
  said = {
    key: str(value)
    for key, value in {**file.metadata, **(general or {})}.items()
    if key.startswith("general.") and isinstance(value, str)
  }
  dtype = KINDS[_widest(kinds.values())]
  table |= {"dtype": dtype, "torch_dtype": dtype, **special_ids(file.tokenizer)}
  if name := said.get("general.name"):
    table["_name_or_path"] = name
  loss = Loss()

  def tensors() -> Iterator[np.ndarray]:
    for done, place in enumerate(all_places):
      yield _encoded(file, place, kinds[place.file_name], loss)
      if progress:
        progress(done + 1, len(all_places))

  temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
  temporary.mkdir()
  try:
    (temporary / "config.json").write_text(_pretty(table), encoding="utf-8")
    _write_tokenizer(file, temporary)
    write_safetensors(
      temporary / "model.safetensors",
      {place.file_name: place.shape(config) for place in all_places},
      tensors(),
      {name: KINDS[own] for name, own in kinds.items()},
      {
        "format": "pt",
        **{key: value for key, value in said.items() if key != "general.architecture"},
      },
    )
    _verify(file, temporary)
    # Fails where somebody has put something else meanwhile.
    os.rename(temporary, folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  counts: dict[str, int] = {}
  for own in kinds.values():
    counts[own] = counts.get(own, 0) + 1
  return Converted(model_type, counts, loss)


def _own(file: ModelFile, place: Place) -> str:
  values = numbers(file, place, "half")
  own = next((name for name, dtype in DTYPES.items() if values.dtype == dtype), "F32")
  # Norms of a GGUF file are float32, whatever they were.
  return narrowest(values) if own == "F32" else own


def _widest(kinds) -> str:
  found = set(kinds)
  return found.pop() if len(found) == 1 else "F32"


def _encoded(file: ModelFile, place: Place, kind: str, loss: Loss) -> np.ndarray:
  values = numbers(file, place, "half")
  with np.errstate(over="ignore"):
    rounded = values.astype(DTYPES[kind])
  if not np.isfinite(rounded.astype(np.float32)).all():
    raise ValueError(f"{place.file_name}: a number is beyond {kind}: choose BF16 or F32")
  loss.add(place.file_name, values.astype(np.float32), rounded.astype(np.float32))
  return rounded


def _write_tokenizer(file: ModelFile, folder: Path) -> None:
  """That of a folder as it is; another in the files that hold its kind."""
  if file.format == "huggingface":
    for name in _TOKENIZER_FILES:
      if (Path(file.path) / name).is_file():
        shutil.copyfile(Path(file.path) / name, folder / name)
    return
  spec = file.tokenizer
  (folder / "generation_config.json").write_text(_pretty(special_ids(spec)), encoding="utf-8")
  if spec is None:
    return
  table = tokenizer_config(spec, file.config)
  if spec.kind in ("spm", "sentencepiece"):
    (folder / "tokenizer.model").write_bytes(sentencepiece_from_spec(spec))
    table |= _spm_config(spec)
  else:
    text = json_from_spec(padded(spec, file.config.vocab_size))
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
  (folder / "tokenizer_config.json").write_text(_pretty(table), encoding="utf-8")


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


def _verify(file: ModelFile, folder: Path) -> None:
  """What was written is what will be read."""
  with open_model(folder) as made:
    made.check()
    wanted = names.in_words(dataclasses.replace(file.config, rope_style="half"))
    if not alike(names.in_words(made.config), wanted):
      raise AssertionError(f"wrote {wanted}, read {made.config}")

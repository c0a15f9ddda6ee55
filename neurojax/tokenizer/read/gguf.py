"""Reads a TokenizerSpec from GGUF's `tokenizer.*` keys.

llama.cpp (`src/llama-vocab.cpp`) gives the defaults for keys that a file leaves out, and the texts by
which end-of-turn tokens are known where no key names them.
"""

from collections.abc import Mapping, Sequence

from neurojax.tokenizer.pretokenizers import pre_tokenizer
from neurojax.tokenizer.stop_tokens import STOP_TEXTS
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

_PREFIX = "tokenizer.ggml."
# GGUF's numbers for llama.cpp's token types; 0 is "undefined".
_TYPES = {0: "unused", 1: "normal", 2: "unknown", 3: "control", 4: "user", 5: "unused", 6: "byte"}
_UNSUPPORTED = ("bert", "t5", "rwkv", "plamo2", "hybriddna", "whitespace", "test")
# Fill-in-the-middle tokens that also end a generation: the key's last part and known spellings.
_FILL_STOPS = {
  "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
  "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
  "fim_sep_token_id": ("<|file_sep|>",),
}


def spec_from_gguf(metadata: Mapping[str, object]) -> TokenizerSpec:
  """Reads the tokenizer of a GGUF file.

  Args:
    metadata: Plain Python values (str, int, float, bool, list) by GGUF key. Only `tokenizer.*` and
      `general.name` are read.
  Raises:
    ValueError: a key is missing, or its value has the wrong type, length or range.
    NotImplementedError: this package lacks the tokenizer or pre-tokenizer.
  """
  model = _read(metadata, "model", str)
  if model == "llama":
    kind, pre, rules = "spm", None, None
  elif model in ("gpt2", "gemma4"):
    kind = "bpe"
    pre = "gemma4" if model == "gemma4" else _read(metadata, "pre", str, _MISSING_PRE)
    rules = pre_tokenizer(pre)
  elif model in _UNSUPPORTED:
    raise NotImplementedError(
      f"{_PREFIX}model is {model!r}; this package has 'llama', 'gpt2' and 'gemma4'"
    )
  else:
    raise ValueError(
      f"{_PREFIX}model is {model!r}, which names no known tokenizer; expected 'llama', 'gpt2' or"
      " 'gemma4'"
    )

  tokens = _read_list(metadata, "tokens", str)
  types = _read_types(metadata, len(tokens))
  scores = merges = ()
  if kind == "spm":
    scores = tuple(map(float, _read_list(metadata, "scores", (int, float))))
    _check_length("scores", len(scores), len(tokens))
  else:
    merges = tuple(_read_list(metadata, "merges", str))

  is_spm = kind == "spm"
  bos_id = _read_id(metadata, "bos_token_id", len(tokens), 1 if is_spm else None)
  eos_id = _read_id(metadata, "eos_token_id", len(tokens), 2 if is_spm else None)
  unknown_id = _read_id(metadata, "unknown_token_id", len(tokens), 0 if is_spm else None)
  stop_ids, types = _stops(metadata, tokens, types, merges, eos_id)
  add_bos = _read_flag(metadata, "add_bos_token", is_spm or rules.add_bos)
  return TokenizerSpec(
    kind=kind,
    tokens=tuple(tokens),
    types=tuple(types),
    merges=merges,
    scores=scores,
    pre=pre,
    bos_id=bos_id,
    eos_id=eos_id,
    unknown_id=unknown_id,
    stop_ids=stop_ids,
    # Gemma 4 files were published with the flag wrongly off.
    add_bos=add_bos or (rules is not None and rules.lines),
    add_eos=_read_flag(metadata, "add_eos_token", False),
    add_space_prefix=is_spm and _read_flag(metadata, "add_space_prefix", True),
    strip_after_ids=_strips(metadata, tokens, types),
    strip_before_ids=_strips_before(metadata, tokens),
    chat_template=_chat_template(metadata),
  )


_MISSING_PRE = (
  "the file is older than this key, so its pre-tokenizer is not known; convert the model again,"
  " or set the key to 'default' and accept other tokens than in training"
)


def _read(
  metadata: Mapping[str, object], name: str, kind: type, remedy: str = "convert the model again"
):
  key = _PREFIX + name
  if key not in metadata:
    raise ValueError(f"{key} is missing; {remedy}")
  value = metadata[key]
  if not isinstance(value, kind):
    raise ValueError(f"{key} is {value!r}; expected {kind.__name__}; the file is damaged")
  return value


def _read_list(metadata: Mapping[str, object], name: str, kind: type | tuple) -> Sequence:
  key = _PREFIX + name
  if key not in metadata:
    raise ValueError(f"{key} is missing; convert the model again")
  values = metadata[key]
  if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
    raise ValueError(f"{key} is a {type(values).__name__}; expected a list; the file is damaged")
  for i, value in enumerate(values):
    if not isinstance(value, kind):
      raise ValueError(f"{key}[{i}] is {value!r}, of the wrong type; the file is damaged")
  return values


def _check_length(name: str, length: int, size: int):
  if length != size:
    raise ValueError(
      f"{_PREFIX}{name} has {length} entries, but {_PREFIX}tokens has {size}; the file is damaged"
    )


def _read_types(metadata: Mapping[str, object], size: int) -> list[str]:
  numbers = _read_list(metadata, "token_type", int)
  _check_length("token_type", len(numbers), size)
  for i, number in enumerate(numbers):
    if number not in _TYPES:
      raise ValueError(f"{_PREFIX}token_type[{i}] is {number}; expected 0 to 6; convert again")
  return [_TYPES[number] for number in numbers]


def _read_id(
  metadata: Mapping[str, object], name: str, size: int, default: int | None = None
) -> int | None:
  key = _PREFIX + name
  if key not in metadata:
    return default if default is not None and default < size else None
  value = metadata[key]
  if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
    raise ValueError(f"{key} is {value!r}; expected an id below {size}; correct or remove the key")
  return value


def _read_flag(metadata: Mapping[str, object], name: str, default: bool) -> bool:
  value = metadata.get(_PREFIX + name, default)
  if not isinstance(value, bool):
    raise ValueError(f"{_PREFIX}{name} is {value!r}; expected true or false; correct the key")
  return value


def _chat_template(metadata: Mapping[str, object]) -> str | None:
  template = metadata.get("tokenizer.chat_template")
  if template is not None and not isinstance(template, str):
    raise ValueError(f"tokenizer.chat_template is a {type(template).__name__}; expected a string")
  return template


def _stops(
  metadata: Mapping[str, object],
  tokens: Sequence[str],
  types: list[str],
  merges: Sequence[str],
  eos_id: int | None,
) -> tuple[frozenset[int], list[str]]:
  """Returns the ids that end a generation, and the token types.

  Tokens that are known by their text to end one become control tokens.
  """
  size = len(tokens)
  # A token that merges make is text: Qwen2's "</s>" is a piece of HTML (llama.cpp stops there).
  known = STOP_TEXTS.union(*_FILL_STOPS.values())
  spelled = {text for line in merges if (text := line.replace(" ", "", 1)) in known}
  by_text = {i: t for i, t in enumerate(tokens) if t in STOP_TEXTS and t not in spelled}
  texts = set(by_text.values())
  # These vocabularies have other stops, and give these texts another meaning.
  if texts & {"<|call|>", "<|calls|>"} and texts & {"<|return|>", "<|flush|>"}:
    by_text = {i: text for i, text in by_text.items() if text != "<|end|>"}
  if "<|tool_response>" in texts or "<|plamo:eos|>" in tokens:
    by_text = {i: text for i, text in by_text.items() if text != "</s>"}
  stops = set(by_text)
  for name, spellings in _FILL_STOPS.items():
    found = _read_id(metadata, name, size)
    if found is None:
      allowed = set(spellings) - spelled
      found = next((i for i, text in enumerate(tokens) if text in allowed), None)
      if found is not None:
        by_text[found] = tokens[found]
    stops.add(found)
  stops |= {_read_id(metadata, name, size) for name in ("eot_token_id", "eom_token_id")}
  stops.add(eos_id)
  # Some files call them ordinary text, which would let a user's text end a turn.
  types = ["control" if i in by_text else kind for i, kind in enumerate(types)]
  return frozenset(stops - {None}), types


def _strips_before(metadata: Mapping[str, object], tokens: Sequence[str]) -> frozenset[int]:
  """Returns mask tokens that swallow the space before them. No GGUF key names them."""
  pre, name = metadata.get(_PREFIX + "pre"), str(metadata.get("general.name", "")).lower()
  mask = "<mask>" if pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code") else None
  mask = "[MASK]" if mask is None and "modern-bert" in name else mask
  return frozenset({tokens.index(mask)} if mask in tokens else ())


def _strips(
  metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[str]
) -> frozenset[int]:
  """Returns Phi-3's special tokens, which swallow the space after them. No GGUF key says so."""
  name = str(metadata.get("general.name", "")).lower()
  if "phi-3" not in name and "phi3" not in name:
    return frozenset()
  keep = {"<unk>", "<s>", "<|endoftext|>"}
  return frozenset(
    i
    for i, text in enumerate(tokens)
    if text not in keep and (types[i] in ("control", "user", "unknown") or text == "</s>")
  )

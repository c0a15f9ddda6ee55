"""How vocabularies spell bytes."""

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType

SPACE = "\u2581"
"""The character that stands for a space in SentencePiece's vocabularies."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte's own token in SentencePiece's vocabularies."""


@functools.cache
def byte_alphabet() -> Mapping[str, int]:
  """GPT-2's printable character for each byte: itself where it shows, else from U+0100 on."""
  shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  hidden = [byte for byte in range(256) if byte not in shown]
  return MappingProxyType(
    {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
  )

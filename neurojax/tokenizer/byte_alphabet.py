"""The spellings that vocabularies have for bytes and spaces."""

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType

SPACE = "\u2581"
"""The character that stands for a space in SentencePiece's vocabularies."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""Matches the token that stands for one byte in SentencePiece's vocabularies."""


@functools.cache
def byte_alphabet() -> Mapping[str, int]:
  """Returns the byte of each character of GPT-2's alphabet.

  A printable byte is its own character; the others have the characters from U+0100 on.
  """
  shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  hidden = [byte for byte in range(256) if byte not in shown]
  return MappingProxyType(
    {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
  )

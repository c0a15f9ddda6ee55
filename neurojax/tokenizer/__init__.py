"""Turns text into token ids and back; chat templates and stop strings."""

from neurojax.tokenizer.chat.prompt import encode_chat
from neurojax.tokenizer.chat.template import ChatTemplate
from neurojax.tokenizer.read.gguf import spec_from_gguf
from neurojax.tokenizer.stop_strings import StopStrings
from neurojax.tokenizer.tokenizer import Detokenizer, Tokenizer
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

__all__ = [
  "ChatTemplate",
  "Detokenizer",
  "StopStrings",
  "Tokenizer",
  "TokenizerSpec",
  "encode_chat",
  "spec_from_gguf",
]

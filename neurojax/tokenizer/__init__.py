"""Text to token ids and back, chat templates, stop strings. Imports no JAX."""

from neurojax.tokenizer.chat import ChatTemplate
from neurojax.tokenizer.conversation import encode_chat
from neurojax.tokenizer.from_gguf import spec_from_gguf
from neurojax.tokenizer.spec import TokenizerSpec
from neurojax.tokenizer.stopping import StopStrings
from neurojax.tokenizer.tokenizer import Detokenizer, Tokenizer

__all__ = [
  "ChatTemplate",
  "Detokenizer",
  "StopStrings",
  "Tokenizer",
  "TokenizerSpec",
  "encode_chat",
  "spec_from_gguf",
]

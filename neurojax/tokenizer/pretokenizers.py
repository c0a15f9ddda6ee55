"""How each known vocabulary cuts text before merging, by the name that GGUF gives it.

The names and the flags are llama.cpp's (`src/llama-vocab.cpp`), the regexes those that the models
publish in their tokenizer.json. Where llama.cpp approximates a published regex (the letter cases of
tekken and gpt-4o, `(?i:'s)`, which also matches U+017F, the white space within deepseek-llm's
U+0800 to U+4E00), the published one stands here: it is what the model was trained on.
"""

import dataclasses

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_QWEN35 = (
  rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
  rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
  rf"|\p{{N}}|{_SLASHES}|{_SPACES}"
)
_GPT4O = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
  rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
  rf"|\p{{N}}{{1,3}}|{_SLASHES}|{_SPACES}"
)
_DEEPSEEK_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LETTERS = (
  "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-"
  "\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
  "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
  "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
  "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-"
  "\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
  "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
  "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
  "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
  "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
  "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
  "\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_DEEPSEEK3 = (
  r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
  rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreTokenizer:
  """Rules before and around the merges of one family of "bpe" vocabularies.

  Attributes:
    patterns: Regexes (Oniguruma) applied in order: each cuts every piece that the one before left
      into its matches and what lies between them.
    byte_level: Whether pieces are spelled in GPT-2's byte alphabet; otherwise they are plain text
      with U+2581 for a space and `<0xNN>` for bytes without a piece.
    whole_words: Whether a piece that is a token by itself is taken without merging.
    add_bos: Whether BOS goes in front where the model file does not say.
  """

  patterns: tuple[str, ...]
  byte_level: bool = True
  whole_words: bool = False
  add_bos: bool = False


_ONE_DIGIT = PreTokenizer(patterns=(r"\p{N}", _GPT2))
_PLAIN = PreTokenizer(patterns=(_GPT2,))
_LLAMA = PreTokenizer(patterns=(_LLAMA3,), whole_words=True, add_bos=True)
_CL100K = PreTokenizer(patterns=(_LLAMA3,))
_QWEN = PreTokenizer(patterns=(_QWEN2,))
_O200K = PreTokenizer(patterns=(_GPT4O,))
_DEEPSEEK_V3 = PreTokenizer(
  patterns=(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3)
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
  # For files whose own pre-tokenizer is not known; llama.cpp's invention, no model's.
  "default": PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
  "llama3": _LLAMA,
  "llama-v3": _LLAMA,
  "llama-bpe": _LLAMA,
  "lfm2": _LLAMA,
  # As llama.cpp reads these; not compared with the tokenizer.json of the models.
  "falcon3": _LLAMA,
  "falcon-h1": _LLAMA,
  "dbrx": _CL100K,
  "smaug-bpe": _CL100K,
  "chatglm-bpe": _CL100K,
  "glm4": PreTokenizer(patterns=(_LLAMA3,), whole_words=True),
  "gpt-2": _PLAIN,
  "phi-2": _PLAIN,
  "mpt": _PLAIN,
  "olmo": _PLAIN,
  "smollm": _ONE_DIGIT,
  "starcoder": _ONE_DIGIT,
  "refact": _ONE_DIGIT,
  "command-r": _ONE_DIGIT,
  "qwen2": _QWEN,
  "deepseek-r1-qwen": _QWEN,
  "stablelm2": _QWEN,
  "qwen35": PreTokenizer(patterns=(_QWEN35,)),
  "tekken": PreTokenizer(patterns=(_TEKKEN,), whole_words=True, add_bos=True),
  "gpt-4o": _O200K,
  "llama4": _O200K,
  "deepseek-llm": PreTokenizer(
    patterns=(
      r"[\r\n]",
      _DEEPSEEK_LETTERS,
      "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
      r"\s+$",
      _DEEPSEEK_HAN,
      r"\p{N}+",
    )
  ),
  "deepseek-coder": PreTokenizer(
    patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}")
  ),
  "deepseek-v3": _DEEPSEEK_V3,
  "falcon": PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
  "gemma4": PreTokenizer(patterns=(r"[^\n]+|[\n]+",), byte_level=False, add_bos=True),
}


def pre_tokenizer(name: str) -> PreTokenizer:
  """The rules of a name. Raises NotImplementedError: the name is not known here."""
  try:
    return PRE_TOKENIZERS[name]
  except KeyError:
    raise NotImplementedError(
      f"pre-tokenizer {name!r} is not known here, and a guess would give wrong tokens; "
      f"known are {', '.join(sorted(PRE_TOKENIZERS))}"
    ) from None

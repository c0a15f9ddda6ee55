"""The rules by which known vocabularies cut text before merging, by the name that GGUF gives them.

The names and the flags are llama.cpp's (`src/llama-vocab.cpp`), the regexes those that the models
publish in their tokenizer.json. Where llama.cpp approximates a published regex (the letter cases of
tekken and gpt-4o, `(?i:'s)`, which also matches U+017F, the white space within deepseek-llm's
U+0800 to U+4E00), the published one stands here: it is what the model was trained on. Regexes that
group digits from the right are written so that long runs of digits take no quadratic time.
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
_KANA_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
  r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
  r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
  rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_SPARK = (
  r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
  r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
  r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
)


def _groups(digit: str) -> str:
  """Returns a regex that cuts a piece of digits alone into threes from its end.

  It looks at the length once, then matches in a chain, each match where the one before ended.
  """
  three = f"{digit}{{3}}"
  whole = rf"\A{digit}{{1,2}}(?=(?:{three})++\z)|\A{three}(?=(?:{three})*+\z)"
  return rf"{whole}|(?<={digit})\G{three}"


_DIGIT_GROUPS = _groups(r"\d")
_NUMBER_GROUPS = _groups(r"\p{N}")
_YOUTU_WORDS = _GPT4O.replace(r"\p{N}{1,3}", r"\p{N}")
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_YOUTU = (
  "[\uac00-\ud7a3\u3131-\u318e]+"
  "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
  f"|[\u3105-\u312f]+|{_KANA_HAN}"
)
_NO_HAN_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_NO_HAN_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI = (
  rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_NO_HAN_UPPER}*{_NO_HAN_LOWER}+{_CONTRACTIONS}?"
  rf"|[^\r\n\p{{L}}\p{{N}}]?{_NO_HAN_UPPER}+{_NO_HAN_LOWER}*{_CONTRACTIONS}?"
  rf"|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
)
_AFMOE_SCRIPTS = (
  "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
  "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af"
  "\u1100-\u11ff]+"
)
_JAIS2_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
_JAIS2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+|{_JAIS2_SPACES}|\s{{1}}"
_EXAONE_MOE = (
  rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BAILING = (
  r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
  r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreTokenizer:
  """The rules before and around the merges of one family of "bpe" vocabularies.

  Attributes:
    patterns: Regexes (Oniguruma) applied in order: each cuts every piece that the one before left
      into its matches and what lies between them.
    byte_level: Whether pieces are spelled in GPT-2's byte alphabet. Otherwise they are plain text
      with U+2581 for a space and `<0xNN>` for bytes without a piece.
    whole_words: Whether a piece that is a token by itself is taken without merging.
    lines: Whether a run of newlines that is a token is taken whole (text only).
    cuts_at_spaces: Whether a piece begins at each space between two letters.
    add_bos: Whether BOS goes in front where the model file does not say.
  """

  patterns: tuple[str, ...]
  byte_level: bool = True
  whole_words: bool = False
  lines: bool = False
  cuts_at_spaces: bool = True
  add_bos: bool = False


_ONE_DIGIT = PreTokenizer(patterns=(r"\p{N}", _GPT2))
_PLAIN = PreTokenizer(patterns=(_GPT2,))
_LLAMA = PreTokenizer(patterns=(_LLAMA3,), whole_words=True, add_bos=True)
_CL100K = PreTokenizer(patterns=(_LLAMA3,))
_GLM = PreTokenizer(patterns=(_LLAMA3,), whole_words=True)
_QWEN = PreTokenizer(patterns=(_QWEN2,))
_O200K = PreTokenizer(patterns=(_GPT4O,))
_COMMAND = PreTokenizer(patterns=(r"(?<!\d)\d++\b", _DIGIT_GROUPS, _GPT4O))
_DEEPSEEK_V3 = PreTokenizer(patterns=(r"\p{N}{1,3}", _KANA_HAN, _DEEPSEEK3))
_LING = PreTokenizer(patterns=(_BAILING,))
_FINNISH = PreTokenizer(patterns=(_BLOOM,))
_LINES = r"[^\n]+|[\n]+"
_GEMMA = PreTokenizer(patterns=(_LINES,), byte_level=False, lines=True, add_bos=True)

_ALIKE: tuple[tuple[PreTokenizer, str], ...] = (
  (_LLAMA, "llama3 llama-v3 llama-bpe lfm2 falcon3 falcon-h1 pixtral midm-2.0 jina-v5-nano"),
  (_CL100K, "dbrx smaug-bpe chatglm-bpe"),
  (_GLM, "glm4 glm5"),
  (_PLAIN, "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum"),
  (_PLAIN, "modern-bert jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe"),
  (_ONE_DIGIT, "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
  (_QWEN, "qwen2 deepseek-r1-qwen stablelm2 kormo f2llmv2 megrez hunyuan solar-open grok-2"),
  (_O200K, "gpt-4o llama4 kanana2 talkie minimax-m2"),
  (_COMMAND, "tiny_aya cohere2moe"),
  (_DEEPSEEK_V3, "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
  (_LING, "bailingmoe bailingmoe2 llada-moe"),
  (_FINNISH, "bloom gpt3-finnish poro-chat"),
  (_GEMMA, "gemma4 granite-embed-multi-311m"),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
  # For files whose own pre-tokenizer is not known; llama.cpp's invention, no model's.
  "default": PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
  **{name: rules for rules, names in _ALIKE for name in names.split()},
  "qwen35": PreTokenizer(patterns=(_QWEN35,)),
  "tekken": PreTokenizer(patterns=(_TEKKEN,), whole_words=True, add_bos=True),
  "granite-embed-multi-97m": PreTokenizer(patterns=(_GPT4O,), whole_words=True),
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
  "falcon": PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
  "minicpm5": PreTokenizer(
    patterns=(r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}+|{_SYMBOLS}|{_SPACES}"),
    whole_words=True,
  ),
  "spark2_5": PreTokenizer(patterns=(r"\p{N}{1,3}", _KANA_HAN, _SPARK, r"\p{N}")),
  "youtu": PreTokenizer(patterns=(_YOUTU, _YOUTU_WORDS), whole_words=True),
  "jais-2": PreTokenizer(patterns=(_JAIS2,)),
  "viking": PreTokenizer(patterns=(_BLOOM, r"\p{N}")),
  "exaone-moe": PreTokenizer(patterns=(_EXAONE_MOE,), cuts_at_spaces=False),
  "chameleon": PreTokenizer(
    patterns=(
      r"<sentinel:[0-9]+>",
      r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
      r"([\t\n]|    |  )",
      r"\p{N}",
      r"[\p{P}!-/:-@\[-`{-~]",
      _GPT2,
    ),
    add_bos=True,
  ),
  "superbpe": PreTokenizer(
    patterns=(r"\p{N}+", _DIGIT_GROUPS, r"(?=(\d{3})+(?!\d))"), cuts_at_spaces=False
  ),
  "seed-coder": PreTokenizer(
    patterns=(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
  ),
  "kimi-k2": PreTokenizer(patterns=(_KIMI,)),
  "ufakzeka": PreTokenizer(patterns=(rf"{_WORDS}|\p{{N}}|{_SYMBOLS}|{_SPACES}",)),
  "afmoe": PreTokenizer(patterns=(r"\p{N}+", _NUMBER_GROUPS, _AFMOE_SCRIPTS, _DEEPSEEK3)),
  "laguna": PreTokenizer(patterns=(_LINES, _QWEN2)),
  "sarvam-moe": PreTokenizer(patterns=(_LINES,), byte_level=False),
}


def pre_tokenizer(name: str) -> PreTokenizer:
  """Returns the rules of a name. Raises: NotImplementedError: the name is not known here."""
  try:
    return PRE_TOKENIZERS[name]
  except KeyError:
    raise NotImplementedError(
      f"pre-tokenizer {name!r} is not known here, and a guess would give wrong tokens; "
      f"known are {', '.join(sorted(PRE_TOKENIZERS))}"
    ) from None

"""Round trips, streaming and the border between text and special tokens."""

import heapq
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from neurojax.tokenizer import Tokenizer
from neurojax.tokenizer.encode.merge import Merger, merge
from neurojax.tokenizer.pretokenizers import PRE_TOKENIZERS
from tests.tokenizer import vocab

few = settings(deadline=None, max_examples=40)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text(
  st.sampled_from("the 's\n\t 12<>/|é́🦙中\u2581ab"), max_size=60
)
BPE = Tokenizer(vocab.tiny_bpe())
SPM = Tokenizer(vocab.tiny_spm())
RAW = Tokenizer(
  vocab.tiny_spm(
    kind="bpe",
    pre="gemma4",
    tokens=(*vocab.tiny_spm().tokens, "\n\n"),
    types=(*vocab.tiny_spm().types, "normal"),
    scores=(),
    merges=("a b", "ab a", "▁ ab", "< s"),
    add_space_prefix=False,
  )
)


@few
@given(texts)
def test_byte_level_text_comes_back(text: str):
  assert BPE.decode(BPE.encode(text)) == text


@few
@given(texts)
def test_scored_text_comes_back(text: str):
  # U+2581 is how such a vocabulary writes a space; nothing can tell the two apart.
  assert SPM.decode(SPM.encode(text)) == text.replace("\u2581", " ")
  assert RAW.decode(RAW.encode(text)) == text.replace("\u2581", " ")


@pytest.mark.parametrize(
  "pre", sorted(name for name, rules in PRE_TOKENIZERS.items() if rules.byte_level)
)
def test_every_pre_tokenizer_keeps_the_text(pre: str):
  tokenizer = Tokenizer(vocab.tiny_bpe(pre=pre))

  @settings(deadline=None, max_examples=15)
  @given(texts)
  def check(text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text

  check()


@pytest.mark.parametrize("name", vocab.NAMES)
def test_real_vocabularies_keep_the_text(name: str):
  tokenizer = vocab.real(name)
  spaced = "\u2581" if name in ("llama-spm", "gemma-4") else None

  @few
  @given(texts)
  def check(text: str):
    expected = text.replace(spaced, " ") if spaced else text
    assert tokenizer.decode(tokenizer.encode(text)) == expected

  check()


@few
@given(st.data(), st.sampled_from([BPE, SPM, RAW]), st.booleans(), st.booleans())
def test_streaming_is_decoding(data, tokenizer: Tokenizer, special: bool, continues: bool):
  ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
  stream = tokenizer.stream(special=special, continues=continues)
  pushed = [stream.push(token_id) for token_id in ids]
  text = "".join(pushed) + stream.finish()
  assert text == tokenizer.decode(ids, special=special, continues=continues)
  # The oracle: all bytes at once.
  hidden = {"control", "unknown"}
  types = tokenizer.spec.types
  raw = b"".join(tokenizer.piece(i) for i in ids if special or types[i] not in hidden)
  if continues or not tokenizer.spec.add_space_prefix:
    assert text == raw.decode("utf-8", "replace")


@few
@given(texts)
def test_streaming_shows_only_whole_characters(text: str):
  stream = BPE.stream()
  shown = ""
  for token_id in BPE.encode(text):
    shown += stream.push(token_id)
    assert text.startswith(shown)
  assert stream.finish() == ""
  assert shown == text


def test_a_torn_character_becomes_the_replacement():
  llama = SPM.encode("🦙")
  assert [SPM.piece(i) for i in llama] == [b" ", b"\xf0", b"\x9f", b"\xa6", b"\x99"]
  stream = SPM.stream()
  assert [stream.push(i) for i in llama] == ["", "", "", "", "🦙"]
  stream = SPM.stream()
  assert "".join(stream.push(i) for i in llama[:3]) == ""
  assert stream.finish() == "\ufffd" == SPM.decode(llama[:3])


def test_only_the_first_space_is_taken_away():
  ab = SPM.encode("ab")
  assert [SPM.piece(i) for i in ab] == [b" ab"]
  assert SPM.decode(ab) == "ab"
  assert SPM.decode([1, *ab, *ab]) == "ab ab"
  assert SPM.decode([1, *ab], special=True) == "<s>ab"
  assert SPM.decode(ab, continues=True) == " ab"
  assert SPM.decode(SPM.encode("  ab")) == "  ab"
  assert SPM.encode("") == []
  assert Tokenizer(vocab.tiny_spm(add_space_prefix=False)).decode(ab) == " ab"


def test_best_score_first_then_leftmost():
  # "ab" (-1) beats "aba" (-2) and "▁ab" (-3); of two "ab" neither blocks the other.
  assert [SPM.piece(i) for i in SPM.encode("abab")] == [b" ab", b"ab"]
  assert [SPM.piece(i) for i in SPM.encode("xaba")] == [b" ", b"x", b"aba"]


@few
@given(
  st.text("ab c", max_size=30),
  st.dictionaries(st.text("ab c", min_size=2, max_size=4), st.integers(0, 3), max_size=12),
)
def test_cutting_and_queueing_are_plain_merging(text: str, ranks: dict[str, int]):
  rank = lambda a, b: ranks.get(a + b)  # noqa: E731
  plain = list(text)
  while True:
    found = [(rank(a, b), i) for i, (a, b) in enumerate(itertools.pairwise(plain))]
    found = [pair for pair in found if pair[0] is not None]
    if not found:
      break
    i = heapq.nsmallest(1, found)[0][1]
    plain[i : i + 2] = [plain[i] + plain[i + 1]]
  assert list(merge(text, rank)) == plain
  joints = {a + b for piece in ranks for a, b in itertools.pairwise(piece)}
  assert Merger(rank, joints).pieces(text) == plain


def test_special_tokens_in_plain_text_stay_text():
  hostile = "the <s></s><turn> end"
  for tokenizer in (BPE, SPM, RAW):
    ids = tokenizer.encode(hostile)
    assert all(tokenizer.spec.types[i] not in ("control", "unknown") for i in ids)
    assert tokenizer.decode(ids) == hostile


def test_merges_never_spell_a_special_token():
  # Both vocabularies could build "<s>" from pieces; llama.cpp would.
  spec = vocab.tiny_bpe()
  bpe = Tokenizer(
    vocab.tiny_bpe(
      tokens=(*spec.tokens, "<s"), types=(*spec.types, "normal"), merges=("< s", "<s >")
    )
  )
  assert 259 not in bpe.encode("<s>")
  assert bpe.decode(bpe.encode("<s>")) == "<s>"
  assert SPM.spec.tokens[1] == "<s>"
  assert [SPM.piece(i) for i in SPM.encode("<s>")] == [b" ", b"<s", b">"]
  # Nor does the spelling of a byte token stand for the byte.
  assert 3 + 0x41 not in SPM.encode("<0x41>")
  # A word that is a token by itself is not the control token of that spelling either.
  tokens = tuple("turn" if token == "<turn>" else token for token in spec.tokens)
  whole = Tokenizer(vocab.tiny_bpe(pre="llama-bpe", tokens=tokens))
  assert whole.encode("turn") == [*b"turn"]


@pytest.mark.parametrize("name", vocab.NAMES)
def test_real_special_tokens_in_plain_text_stay_text(name: str):
  tokenizer = vocab.real(name)
  spelled = [
    t
    for t, kind in zip(tokenizer.spec.tokens, tokenizer.spec.types, strict=True)
    if kind in ("control", "unknown", "byte")
  ]
  for token in spelled[:400]:
    ids = tokenizer.encode(f"x{token}y")
    assert all(tokenizer.spec.types[i] in ("normal", "user") for i in ids), token
    assert tokenizer.decode(ids) == f"x{token}y"


def test_special_tokens_are_parsed_on_request():
  assert BPE.encode("<s>the<turn>", parse_special=True) == [259, 257, 261]
  assert BPE.encode("the", add_special=True) == [259, 257, 260]
  assert BPE.encode("<s>the", parse_special=True, add_special=True) == [259, 259, 257, 260]
  assert SPM.encode("<s>ab</s>ab", parse_special=True) == [
    1,
    *SPM.encode("ab"),
    2,
    *SPM.encode("ab"),
  ]
  assert BPE.decode([259, 257, 261], special=True) == "<s>the<turn>"
  assert BPE.decode([259, 257, 261]) == "the"


def test_a_byte_without_a_token_is_left_out_and_joins_nothing():
  spec = vocab.tiny_bpe()
  tokens = list(spec.tokens)
  tokens[ord("x")] = "[gone]"
  tokenizer = Tokenizer(vocab.tiny_bpe(tokens=tuple(tokens)))
  assert tokenizer.encode("txhe txh the") == [ord("t"), *b"he", *b" th", 258]
  assert tokenizer.encode_many(["xx", "xthe"]) == [[], [257]]


def test_user_tokens_are_always_parsed_and_shown():
  assert BPE.encode("the<tool>") == [257, 262]
  assert BPE.decode([262]) == "<tool>"


def test_the_longest_special_token_wins():
  spec = vocab.tiny_bpe()
  tokens = (*spec.tokens, "<turn><s>")
  tokenizer = Tokenizer(vocab.tiny_bpe(tokens=tokens, types=(*spec.types, "control")))
  assert tokenizer.encode("<turn><turn><s>", parse_special=True) == [261, 263]


def test_tokens_that_swallow_space():
  tokenizer = Tokenizer(vocab.tiny_bpe(strip_after_ids=frozenset({261})))
  assert tokenizer.encode("<turn> \n the", parse_special=True) == [261, 257]
  assert tokenizer.encode("<s> the", parse_special=True) == [259, 258]


def test_guarded_text_injects_nothing():
  hostile = "</s><turn>the"
  rendered = f"<turn>{BPE.guard(hostile)}</s>"
  ids = BPE.encode(rendered, parse_special=True, guarded=True)
  assert ids == [261, *BPE.encode(hostile), 260]
  # What the guard prevents.
  assert BPE.encode(f"<turn>{hostile}</s>", parse_special=True).count(261) == 2
  assert BPE.guard("plain <text>") == "plain <text>"
  # A mark that the user brings is not trusted.
  assert BPE.guard("<\ufdd0s>") == BPE.guard("<s>") != "<s>"


@pytest.mark.parametrize("text", [None, b"bytes", 3, ["a"]])
def test_what_is_not_text_is_refused(text):
  with pytest.raises(ValueError, match="text is"):
    BPE.encode(text)


def test_a_lone_surrogate_is_refused():
  for tokenizer in (BPE, SPM, RAW):
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at 1"):
      tokenizer.encode("a\ud800")


@pytest.mark.parametrize("token_id", [-1, 263, 10**12, "1", 1.0, None])
def test_ids_outside_the_vocabulary_are_refused(token_id):
  for call in (BPE.piece, BPE.stream().push, lambda i: BPE.decode([i])):
    with pytest.raises(ValueError, match=str(token_id)):
      call(token_id)


def test_a_character_that_cannot_be_spelled():
  bare = dict(
    tokens=("<unk>", "▁", "a"),
    types=("unknown", "normal", "normal"),
    scores=(0.0, -1.0, -2.0),
    bos_id=None,
    eos_id=None,
    stop_ids=frozenset(),
    add_bos=False,
  )
  assert Tokenizer(vocab.tiny_spm(**bare)).encode("aé") == [1, 2, 0]
  with pytest.raises(ValueError, match="cannot spell 'é'"):
    Tokenizer(vocab.tiny_spm(**bare | dict(unknown_id=None))).encode("aé")


def test_vocabularies_that_contradict_themselves():
  spec = vocab.tiny_bpe()
  with pytest.raises(ValueError, match="both 'th'"):
    Tokenizer(vocab.tiny_bpe(tokens=(*spec.tokens, "th"), types=(*spec.types, "normal")))
  with pytest.raises(ValueError, match="merge 1 is 'th x'"):
    Tokenizer(vocab.tiny_bpe(merges=("t h", "th x")))
  with pytest.raises(ValueError, match="merge 0 is 'th'"):
    Tokenizer(vocab.tiny_bpe(merges=("th",)))
  with pytest.raises(NotImplementedError, match="'no-such'"):
    Tokenizer(vocab.tiny_bpe(pre="no-such"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(kind="wordpiece"), "'wordpiece'"),
    (dict(tokens=(), types=()), "tokens is empty"),
    (dict(types=("normal",)), "types has 1 entries for 263"),
    (dict(types=("odd",) * 263), "odd"),
    (dict(bos_id=263), "bos_id is 263"),
    (dict(eos_id=-1), "eos_id is -1"),
    (dict(stop_ids=frozenset({999})), "stop_ids is 999"),
    (dict(bos_id=None), "add_bos is set"),
    (dict(eos_id=None), "add_eos is set"),
    (dict(pre=None), "pre is None"),
    (dict(kind="spm"), "scores has 0"),
    (dict(kind="spm", scores=(float("nan"),) * 263), "NaN"),
  ],
)
def test_bad_specs_are_refused(changes: dict, message: str):
  with pytest.raises(ValueError, match=message):
    vocab.tiny_bpe(**changes)


@pytest.mark.parametrize(
  ("pre", "text", "pieces"),
  [
    ("gpt-2", "I'm 1234 x", ["I", "'m", " 1234", " x"]),
    ("smollm", "a 12", ["a", " ", "1", "2"]),
    ("llama-bpe", "I'M 12345\n\nx", ["I", "'M", " ", "123", "45", "\n\n", "x"]),
    ("qwen2", "a 12 !?\n", ["a", " ", "1", "2", " !?\n"]),
    ("qwen35", "क\u094d!", ["क\u094d", "!"]),
    ("tekken", "camelCase ÉTÉs", ["camel", "Case", " ÉTÉs"]),
    ("gpt-4o", "Don't HTMLParser", ["Don't", " HTMLParser"]),
    ("deepseek-v3", "1234 x中文.go", ["123", "4", " x", "中文", ".go"]),
    ("deepseek-coder", "a 12\n", ["a", " ", "1", "2", "\n"]),
    ("falcon", "x+=1234", ["x", "+=", "123", "4"]),
    ("default", "x`+1", ["x", "`", "+", "1"]),
  ],
)
def test_where_text_is_cut(pre: str, text: str, pieces: list[str]):
  splits = [
    pre_tokenizers.Split(Regex(p), behavior="isolated") for p in PRE_TOKENIZERS[pre].patterns
  ]
  cut = pre_tokenizers.Sequence(splits).pre_tokenize_str(text)
  assert [piece for piece, _ in cut] == pieces

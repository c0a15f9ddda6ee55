"""Stop strings: however the text is cut, the same comes out."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.tokenizer import StopStrings


def feed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
  matcher = StopStrings(stops)
  out = ""
  for piece in pieces:
    text, hit = matcher.push(piece)
    out += text
    assert hit == matcher.hit
  return out + matcher.finish(), matcher.hit


@settings(deadline=None, max_examples=50)
@given(
  st.lists(st.text("abc", max_size=4), max_size=12),
  st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
def test_any_cut_is_no_cut(pieces: list[str], stops: list[str]):
  text = "".join(pieces)
  found = [at for stop in stops if (at := text.find(stop)) >= 0]
  expected = (text[: min(found)], True) if found else (text, False)
  assert feed(stops, pieces) == expected
  assert feed(stops, list(text)) == expected
  assert feed(stops, [text]) == expected


def test_only_a_possible_stop_is_held_back():
  matcher = StopStrings(["\n\nUser:"])
  assert matcher.push("Yes.\n") == ("Yes.", False)
  assert matcher.push("No.\n\nUs") == ("\nNo.", False)
  assert matcher.push("er: more") == ("", True)
  assert matcher.push("more") == ("", True)
  assert matcher.finish() == ""


def test_an_earlier_longer_stop_has_precedence():
  matcher = StopStrings(["abc", "b"])
  # "abc" may still come, and would begin earlier than the "b" that is there.
  assert matcher.push("ab") == ("", False)
  assert matcher.push("c") == ("", True)
  matcher = StopStrings(["abc", "b"])
  assert matcher.push("xxab") == ("xx", False)
  assert matcher.push("x") == ("a", True)
  matcher = StopStrings(["abc", "b"])
  matcher.push("ab")
  assert matcher.finish() == "a"
  assert matcher.hit


def test_without_stops_everything_passes():
  matcher = StopStrings([])
  assert matcher.push("text") == ("text", False)
  assert matcher.finish() == "" and not matcher.hit


@pytest.mark.parametrize("stops", ["stop", [""], ["a", ""], [None], [b"a"], [3]])
def test_bad_stops_are_refused(stops):
  with pytest.raises(ValueError, match="stop"):
    StopStrings(stops)


def test_hostile_stops_stay_linear():
  matcher = StopStrings(["a" * 10_000 + "b", "a" * 9_999 + "c"])
  start = time.process_time()
  out = "".join(matcher.push("a" * 50)[0] for _ in range(1_000)) + matcher.finish()
  assert out == "a" * 50_000
  # Comparing every suffix anew takes minutes.
  assert time.process_time() - start < 5

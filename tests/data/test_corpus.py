"""Documents out of files: whatever the blocks, the compression and the rows, the same text."""

import gzip
import io
import itertools
import json
import lzma
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neurojax.data.corpus import Corpus

SEPARATOR = "<|sep|>"


def documents(corpus: Corpus) -> list[str]:
  found, held = [], ""
  for part in corpus.parts():
    held += part.text
    if part.ends:
      found.append(held)
      held = ""
  assert held == "", "a document was not ended"
  return found


def write(path: Path, data: bytes) -> Path:
  packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
  path.write_bytes(packed(data))
  return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
  """Blocks and parts so small that everything meets their edges."""
  monkeypatch.setattr("neurojax.data.corpus._BLOCK", 7)
  monkeypatch.setattr("neurojax.data.corpus._PART", 5)
  monkeypatch.setattr("neurojax.data.corpus._LONGEST_PART", 40)
  monkeypatch.setattr("neurojax.data.corpus._LONGEST_LINE", 50)
  monkeypatch.setattr("neurojax.data.corpus._NUL_SHARE", 1.0)


texts = st.text(st.sampled_from("ab é漢\n\r\0 '<|sep>\u2028𝄞"), max_size=120).filter(
  lambda t: SEPARATOR not in t
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
  wanted=st.lists(texts, min_size=1, max_size=5),
  suffix=st.sampled_from(["", ".gz", ".xz"]),
  cut=st.booleans(),
)
def test_text_comes_out_as_it_went_in(small, tmp_path_factory, wanted, suffix: str, cut: bool):
  folder = tmp_path_factory.mktemp("text")
  path = write(folder / f"a.txt{suffix}", SEPARATOR.join(wanted).encode())
  corpus = Corpus([path], separator=SEPARATOR, cut=cut)
  stripped = [document.strip("\r\n") for document in wanted]
  assert documents(corpus) == [document for document in stripped if document]
  assert corpus.tallies[0].bytes == path.stat().st_size and not corpus.bad


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(wanted=texts.filter(bool), cuts=st.lists(st.integers(0, 400), max_size=3))
def test_parts_of_one_file_are_joined_wherever_they_were_cut(
  small, tmp_path_factory, wanted: str, cuts: list[int]
):
  folder, data = tmp_path_factory.mktemp("parts"), wanted.encode()
  places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
  paths = [
    write(folder / f"{i}.xz", data[a:b]) for i, (a, b) in enumerate(itertools.pairwise(places))
  ]
  corpus = Corpus(paths, joined=True)
  assert documents(corpus) == [wanted]
  assert not corpus.bad


def test_files_that_are_not_joined_are_documents_of_their_own(tmp_path: Path):
  paths = [write(tmp_path / name, b"one \xc3\xa9") for name in ("a.txt", "b.gz", "c.xz")]
  assert documents(Corpus(paths)) == ["one é"] * 3


def test_the_content_decides_what_compression_it_is(tmp_path: Path):
  (tmp_path / "a.txt").write_bytes(lzma.compress(b"one ") + lzma.compress(b"two"))
  assert documents(Corpus([tmp_path / "a.txt"])) == ["one two"]
  (tmp_path / "b.gz").write_bytes(b"plain text")
  with pytest.raises(ValueError, match=r"b\.gz: its name says gz"):
    documents(Corpus([tmp_path / "b.gz"]))
  (tmp_path / "c.txt").write_bytes(b"PAR1 and more")
  with pytest.raises(ValueError, match=r"c\.txt.*Parquet"):
    documents(Corpus([tmp_path / "c.txt"]))


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_damaged_archive_is_named(tmp_path: Path, suffix: str):
  path = write(tmp_path / f"a.txt{suffix}", bytes(range(256)) * 200)
  whole = path.read_bytes()
  path.write_bytes(whole[:-9])
  with pytest.raises(ValueError, match=rf"a\.txt{suffix}: damaged archive"):
    documents(Corpus([path]))


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
  assert documents(Corpus([write(tmp_path / "a", b"\xef\xbb\xbftext")])) == ["text"]


@pytest.mark.parametrize("blocks", [1 << 20, 7])
def test_bad_rows_of_text_are_left_out_and_named(tmp_path: Path, monkeypatch, blocks: int):
  monkeypatch.setattr("neurojax.data.corpus._BLOCK", blocks)
  lines = [b"good", b"bad \xff", b"", b"good \xc3\xa9", b"\xed\xa0\x80", b"\xc3", b"end \xf0\x9f"]
  corpus = Corpus([write(tmp_path / "a.txt", b"\n".join(lines))])
  assert documents(corpus) == ["good\n\ngood é\n"]
  assert [row.split(": ")[0] for row in corpus.bad] == [
    f"{tmp_path / 'a.txt'}, line {line}" for line in (2, 5, 6, 7)
  ]
  assert (corpus.tallies[0].rows, corpus.tallies[0].bad_rows) == (7, 4)


BAD_ROWS = {
  b"{": "not JSON",
  b"[1]": "a JSON list",
  b'{"txt": "a"}': "no field 'text'",
  b'{"text": 3}': "is a int",
  b'{"text": null}': "is a NoneType",
  b'{"text": "\\ud800"}': "lone surrogate",
  b'{"text": "\xff"}': "not UTF-8",
  b"[" * 100_000: "nested too deeply",
  b'{"a": ' + b"1" * 5000 + b"}": "not JSON",
  '{"text": "a"}'.encode("utf-16"): "not UTF-8",
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".ndjson.xz"])
def test_bad_rows_of_jsonl_are_left_out_and_named(tmp_path: Path, suffix: str):
  good = [json.dumps({"text": t, "more": [1]}).encode() for t in ("one\ntwo", "trois é", "𝄞")]
  rows = [good[0], *BAD_ROWS, good[1], b"  ", b'{"text": ""}', good[2]]
  corpus = Corpus([write(tmp_path / f"a{suffix}", b"\r\n".join(rows))], separator="two")
  assert documents(corpus) == ["one\ntwo", "trois é", "𝄞"]
  assert len(corpus.bad) == len(BAD_ROWS) == corpus.tallies[0].bad_rows
  for i, (row, reason) in enumerate(zip(corpus.bad, BAD_ROWS.values(), strict=True)):
    assert f"line {i + 2}: " in row and reason in row


def test_a_row_that_is_too_long_is_one_bad_row_and_none_of_it_is_taken(small, tmp_path: Path):
  rows = [
    '{"text": "one"}',
    '{"text": "%s"}' % ("ä" * 90 + "\\n" + '{\\"text\\": 1}'),
    '{"text": "two"}',
  ]
  corpus = Corpus([write(tmp_path / "a.jsonl", "\n".join(rows).encode())])
  assert documents(corpus) == ["one", "two"]
  assert [row.split(": ")[1] for row in corpus.bad] == ["longer than 50 bytes"]
  assert (corpus.tallies[0].rows, corpus.tallies[0].bad_rows) == (3, 1)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl.gz"])
def test_what_decodes_and_is_no_text_is_refused(tmp_path: Path, suffix: str):
  tarred = io.BytesIO()
  with tarfile.open(fileobj=tarred, mode="w") as archive:
    archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
  for data, reason in (
    ("text".encode("utf-16"), "UTF-16" if suffix == ".txt" else ""),
    ("text".encode("utf-16-le"), "iconv"),
    (tarred.getvalue(), "tar archive"),
  ):
    corpus = Corpus([write(tmp_path / f"a{suffix}", data)])
    with pytest.raises(ValueError, match=rf"a{suffix}: .*{reason}"):
      documents(corpus)
  rare = b"a" * 90 + b"\0" + b"b" * 90
  assert documents(Corpus([write(tmp_path / "a.txt", rare)])) == [rare.decode()]


def test_text_that_offers_no_place_is_cut_and_counted(small, tmp_path: Path):
  path = write(tmp_path / "a.txt", ("漢" * 300).encode())
  corpus = Corpus([path])
  assert documents(corpus) == ["漢" * 300] and corpus.forced_cuts > 0
  whole = Corpus([path], cut=False)
  assert [part.text for part in whole.parts()] == ["漢" * 300] and not whole.forced_cuts


def test_wrong_use(tmp_path: Path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    Corpus([tmp_path / "none"])
  with pytest.raises(ValueError, match="no regular file"):
    Corpus([tmp_path])
  path = write(tmp_path / "a", b"a")
  with pytest.raises(ValueError, match="named twice"):
    Corpus([path, path])
  with pytest.raises(ValueError, match="separator is empty"):
    Corpus([path], separator="")
  with pytest.raises(ValueError, match="all text or all JSONL"):
    Corpus([path, write(tmp_path / "b.jsonl", b"{}")], joined=True)

"""Text that comes in: bounded, exact, and never with bytes replaced in silence."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neurojax.cli import main
from neurojax.cli import text as cli_text
from neurojax.cli.text import lines_of_stdin, read_text
from neurojax.tokenizer.read.folder import spec_from_file
from tests import tinymodel


def test_a_device_without_an_end_is_refused(
  capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(cli_text, "MAX_BYTES", 1 << 21)
  with pytest.raises(ValueError, match=r"^/dev/zero: more than 2097152 bytes"):
    read_text(Path("/dev/zero"), "--file")
  model = str(tinymodel.write(tmp_path / "tiny.gguf"))
  assert main(["tokenize", "--model", model, "--file", "/dev/zero"]) == 2
  assert "/dev/zero: more than 2097152 bytes" in capsys.readouterr().err
  assert main(["generate", "--model", model, "--prompt-file", "/dev/zero"]) == 2
  assert "/dev/zero: more than 2097152 bytes" in capsys.readouterr().err
  whole = tmp_path / "whole"
  whole.write_bytes(b"a" * (1 << 21))
  assert len(read_text(whole, "--file")) == 1 << 21
  monkeypatch.setattr("neurojax.tokenizer.read.folder._MAX_BYTES", 1 << 21)
  for name in ("tokenizer.json", "tokenizer.model"):
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"{name}: more than 2097152 bytes"):
      spec_from_file(tmp_path / name)


def test_a_file_that_cannot_be_read_is_named_with_its_option(capsys, tmp_path: Path):
  for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "no", "No such file")):
    assert main(["tokenize", "--model", "neurollm", "--file", str(path)]) == 2
    assert f"--file {path}: {reason}" in capsys.readouterr().err
    assert main(["eval", "ppl", "--model", "neurollm", "--text", str(path)]) == 2
    assert f"--text {path}: {reason}" in capsys.readouterr().err


def test_a_pipe_without_an_end_is_refused(tmp_path: Path):
  model = tinymodel.write(tmp_path / "tiny.gguf")
  script = (
    "import resource, sys\n"
    "from neurojax.cli import main, text\n"
    "text.MAX_BYTES = 1 << 21\n"
    "resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))\n"
    f"sys.exit(main(['tokenize', '--model', {str(model)!r}, '--file', '-']))\n"
  )
  with open("/dev/zero", "rb") as zeros:
    done = subprocess.run(
      [sys.executable, "-c", script], stdin=zeros, capture_output=True, text=True
    )
  assert done.returncode == 2 and "standard input: more than 2097152 bytes" in done.stderr


def lines(data: bytes, monkeypatch: pytest.MonkeyPatch, file: Path | None = None) -> list[str]:
  """What `lines_of_stdin` gives for a pipe with this content, or a file."""
  if file is not None:
    file.write_bytes(data)
    descriptor = os.open(file, os.O_RDONLY)
  else:
    descriptor, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
  with os.fdopen(descriptor) as stdin, monkeypatch.context() as patch:
    patch.setattr(sys, "stdin", stdin)

    async def collect() -> list[str]:
      return [line async for line in lines_of_stdin()]

    return asyncio.run(collect())


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_lines_are_the_same_from_a_pipe_and_a_file(
  kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  file = tmp_path / "talk" if kind == "file" else None
  text = "one\r\ntwo\u2028still\x0btwo\n\né 漢"
  assert lines(text.encode(), monkeypatch, file) == ["one", "two\u2028still\x0btwo", "", "é 漢"]
  assert lines(b"", monkeypatch, file) == []
  for data, at in ((b"ab\xff\n", 2), (b"one\ntwo\xc3", 7), (b"one\n\xe9\xa9\nx", 4)):
    with pytest.raises(ValueError, match=rf"standard input: not UTF-8 at byte {at}: "):
      lines(data, monkeypatch, file)
  monkeypatch.setattr(cli_text, "MAX_LINE_BYTES", 10)
  with pytest.raises(ValueError, match="a line has more than 10 bytes"):
    lines(b"a" * 11, monkeypatch, file)

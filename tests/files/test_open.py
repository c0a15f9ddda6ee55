"""Telling formats apart, and what people hand over by mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neurojax.files.gguf.file import GgufFile
from neurojax.files.open import open_model
from tests.files import tiny


def test_absent_folder_empty_special(tmp_path: Path) -> None:
  with pytest.raises(FileNotFoundError, match=r"absent\.gguf: no such model file"):
    open_model(tmp_path / "absent.gguf")
  with pytest.raises(ValueError, match="folder"):
    open_model(tmp_path)
  (tmp_path / "empty.gguf").touch()
  with pytest.raises(ValueError, match="empty: download it again"):
    open_model(tmp_path / "empty.gguf")
  with pytest.raises(ValueError, match="empty"):
    GgufFile(tmp_path / "empty.gguf")
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(ValueError, match="no regular file"):
    open_model(tmp_path / "pipe")


@pytest.mark.parametrize(
  ("data", "part"),
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    (b"<!DOCTYPE html><html></html>", "web page"),
    (b"PK\x03\x04" + bytes(60), "PyTorch"),
    (b"tjgg\x03\x00\x00\x00" + bytes(60), "GGJT"),
    (b"24ka\x01\x00\x00\x00" + bytes(248), "version 1 or 2"),
    ((20).to_bytes(8, "little") + b'{"a": 1}            ', "safetensors"),
    (b"G", "unknown format"),
    (b"GGU", "unknown format"),
    (bytes(1000), "unknown format"),
    (bytes(range(256)) * 8, "unknown format"),
    (b"\xff" * 28, "unknown format"),
  ],
)
def test_junk_is_named(tmp_path: Path, data: bytes, part: str) -> None:
  path = tmp_path / "model.gguf"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=part) as caught:
    open_model(path)
  assert str(path) in str(caught.value)


def test_gguf_wants_no_tokenizer_file(tmp_path: Path) -> None:
  path = tiny.write_gguf(tmp_path / "m.gguf", tiny.CONFIG, tiny.parameters(tiny.CONFIG))
  with pytest.raises(ValueError, match="carries its tokenizer"):
    open_model(path, path)
  with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
    open_model(path, tmp_path / "absent.bin")


def test_the_room_starts_without_jax() -> None:
  modules = "model_file, names, open, llama2c, digest, inspect"
  program = f"import sys; from neurojax.files import {modules}; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

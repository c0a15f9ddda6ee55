"""Descriptions: of a model, and of a file that cannot be run."""

import dataclasses
import hashlib
import json
from pathlib import Path

import gguf
import pytest
import rich.console
from gguf import GGMLQuantizationType

from neurojax.files import inspect
from neurojax.files.source import open_model
from tests.files import tiny
from tests.shared import shared


def shown(description: dict) -> str:
  console = rich.console.Console(width=200)
  with console.capture() as capture:
    console.print(inspect.render(description))
  return capture.get()


def test_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("NEUROJAX_CACHE_DIR", str(tmp_path / "cache"))
  values = tiny.parameters(tiny.WIDE)
  path = tmp_path / "m.gguf"
  tiny.write_gguf(path, tiny.WIDE, values, kind=GGMLQuantizationType.TQ2_0)
  with open_model(path) as model:
    found = inspect.describe(model, sha256=True)
  assert json.loads(json.dumps(found)) == found
  assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
  assert found["file_bytes"] == path.stat().st_size
  assert (found["format"], found["version"], found["architecture"]) == ("gguf", 3, "llama")
  assert found["name"] == "tiny"
  assert found["config"] == json.loads(json.dumps(dataclasses.asdict(tiny.WIDE)))
  assert found["parameters"] == sum(value.size for value in values.values())
  types = {row["type"]: row for row in found["types"]}
  assert types["TQ2_0"]["bits_per_weight"] == 8 * 66 / 256
  assert types["F32"] == {
    "type": "F32", "tensors": 3, "parameters": 768, "bytes": 3072, "bits_per_weight": 32.0,
  }  # fmt: skip
  assert found["unsupported"] == []
  assert found["tokenizer"] is None
  text = shown(found)
  assert "It can be run." in text
  assert "TQ2_0" in text


def test_a_file_that_cannot_be_run(tmp_path: Path) -> None:
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen99")
  writer.add_name("[bold]not markup[/bold]")
  writer.add_uint16("split.count", 3)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with open_model(tmp_path / "m.gguf") as model:
    found = inspect.describe(model)
  assert found["architecture"] == "qwen99"
  assert found["config"] is None
  assert any("qwen99" in reason for reason in found["unsupported"])
  assert any("split.count = 3" in reason for reason in found["unsupported"])
  text = shown(found)
  assert "It cannot be run:" in text
  assert "[bold]not markup[/bold]" in text


def test_stories260k() -> None:
  folder = shared("data", "stories260K")
  with open_model(folder / "stories260K.bin", folder / "tok512.bin") as model:
    found = inspect.describe(model)
  assert json.loads(json.dumps(found)) == found
  assert found["parameters"] == 260_032
  assert found["unsupported"] == []
  assert found["tokenizer"]["size"] == 512
  assert "260,032" in shown(found)

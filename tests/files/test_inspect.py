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
from neurojax.files.load import load_span
from neurojax.files.open import open_model
from neurojax.tokenizer.write.tokenizer_json import json_from_spec
from tests import tinymodel
from tests.files import tiny
from tests.shared import shared
from tests.tokenizer import vocab


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


def test_memory_is_what_the_stages_hold(tmp_path: Path) -> None:
  config = dataclasses.replace(tiny.WIDE, num_layers=3)
  path = tmp_path / "m.gguf"
  tiny.write_gguf(path, config, tiny.parameters(config), kind=GGMLQuantizationType.TQ2_0)
  with open_model(path) as model:
    rows = inspect.describe(model)["memory"]
    loaded = {
      (weights, dtype): tinymodel.parameter_bytes(load_span(model, weights=weights, dtype=dtype))
      for weights, dtype in (("dense", "float32"), ("stored", "float32"), ("w2a8", "bfloat16"))
    }
  # Four stages of three layers there are not.
  assert {row["stages"] for row in rows} == {1, 2}
  for form, nbytes in loaded.items():
    (found,) = (r for r in rows if (r["weights"], r["dtype"]) == form and r["stages"] == 1)
    assert found["weight_bytes"] == nbytes
  (two,) = (r for r in rows if (r["weights"], r["dtype"], r["stages"]) == ("dense", "float32", 2))
  assert (two["layers"], two["context"]) == (2, config.context_length)
  # Two layers' keys and values.
  assert two["cache_bytes"] == 2 * 2 * 4 * 64 * config.context_length * 4


def test_a_folder_with_a_tokenizer_alone(tmp_path: Path) -> None:
  (tmp_path / "tokenizer.json").write_text(json_from_spec(vocab.tiny_bpe()))
  for path in (tmp_path, tmp_path / "tokenizer.json"):
    found = inspect.describe_tokenizer(path)
    assert json.loads(json.dumps(found)) == found
    assert (found["format"], found["tokenizer"]["size"]) == ("tokenizer", 263)
    assert found["unsupported"] == ["it holds a tokenizer and no model"]
    assert "It cannot be run:" in shown(found)
  (tmp_path / "garbage.bin").write_bytes(b"garbage")
  assert inspect.describe_tokenizer(tmp_path / "garbage.bin") is None
  (tmp_path / "tokenizer.json").unlink()
  assert inspect.describe_tokenizer(tmp_path) is None

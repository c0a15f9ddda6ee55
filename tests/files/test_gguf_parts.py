"""GGUF files in parts, cut by the gguf package, are the file that they were cut from."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from neurojax.files.open import open_model
from tests.files import tiny

NAME = "tiny-00001-of-00003.gguf"


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
  return tiny.parameters(tiny.CONFIG)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, values: dict[str, np.ndarray]) -> Path:
  """A folder with three parts, by the package's own writer."""
  folder = tmp_path_factory.mktemp("parts")
  whole = tiny.write_gguf(folder / "whole.gguf", tiny.CONFIG, values)
  reader = gguf.GGUFReader(whole)
  writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama", split_max_tensors=8)
  for key, field in reader.fields.items():
    if key.startswith("GGUF.") or key == "general.architecture":
      continue
    writer.add_key_value(key, field.contents(), field.types[0])
  for tensor in reader.tensors:
    writer.add_tensor(tensor.name, tensor.data)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  assert sorted(path.name for path in folder.glob("tiny-*")) == [
    f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)
  ]
  return folder


def test_parts_are_read_as_one(cut: Path, values: dict[str, np.ndarray]) -> None:
  with open_model(cut / NAME) as model, open_model(cut / "whole.gguf") as whole:
    model.check()
    assert model.config == whole.config == tiny.CONFIG
    assert set(model.tensors) == set(whole.tensors)
    assert "split.count" not in model.metadata and not any("split" in key for key in model.metadata)
    for key, wanted in values.items():
      name, _, layer = key.partition("/")
      place = int(layer) if layer else None
      np.testing.assert_array_equal(model.read(name, place), wanted, err_msg=key)
      raw = whole.stored_bytes(name, place)
      np.testing.assert_array_equal(model.stored_bytes(name, place), raw)
    assert model.file_bytes == sum(path.stat().st_size for path in cut.glob("tiny-*"))
    assert model.sha256() != whole.sha256()
    model.check_unchanged()


def copies(cut: Path, folder: Path) -> list[Path]:
  return [shutil.copy(path, folder / path.name) for path in sorted(cut.glob("tiny-*"))]


def test_a_part_that_is_missing_or_another_is_refused_by_name(cut: Path, tmp_path: Path) -> None:
  one, two, three = copies(cut, tmp_path)
  with pytest.raises(ValueError, match=r"name the first, tiny-00001-of-00003\.gguf"):
    open_model(two)
  with open_model(one) as model:
    three.write_bytes(three.read_bytes() + bytes(32))
    with pytest.raises(ValueError, match="replaced, changed or removed"):
      model.check_unchanged()
  shutil.copy(two, three)
  with pytest.raises(ValueError, match=r"00003-of-00003.gguf: it says of itself to be no part 3"):
    open_model(one)
  three.unlink()
  with pytest.raises(ValueError, match=r"tiny-00003-of-00003.gguf is missing, one of 3 parts"):
    open_model(one)
  lone = one.rename(tmp_path / "model.gguf")
  with open_model(lone) as model, pytest.raises(NotImplementedError, match="join the parts first"):
    model.check()


def test_damage_of_a_part_names_it(cut: Path, tmp_path: Path) -> None:
  one, two, _ = copies(cut, tmp_path)
  two.write_bytes(two.read_bytes()[:-64])
  with pytest.raises(ValueError, match=r"tiny-00002-of-00003\.gguf: .*truncated"):
    open_model(one)
  two.write_bytes(b"")
  with pytest.raises(ValueError, match=r"tiny-00002-of-00003\.gguf: this file is empty"):
    open_model(one)

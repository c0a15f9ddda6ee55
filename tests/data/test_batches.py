"""Batches: every window once an epoch, the same for any number of readers and processes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from neurojax.data.batches import Rows, open_dataset
from neurojax.data.token_shards import (
  META,
  ShardWriter,
  Tokens,
  check_digests,
  dtype_for,
  read_spec,
)
from neurojax.train.config import DataConfig
from tests.train.standin import settings, write_data


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
  return settings(write_data(tmp_path_factory.mktemp("batches"), shard_tokens=97)).data


def take(data, count: int) -> np.ndarray:
  return np.stack([next(data) for _ in range(count)])


def test_shards_are_one_array(config: DataConfig):
  tokens = Tokens(config.folder, "train")
  files = sorted(Path(config.folder).glob("train-*.bin"))
  whole = np.concatenate([np.fromfile(file, "<u2") for file in files])
  assert len(files) > 20 and len(tokens) == len(whole)
  for start, length in ((0, len(whole)), (90, 20), (96, 2), (97, 97), (5, 0), (len(whole), 0)):
    got = tokens.read(start, length)
    assert got.dtype == np.int32 and np.array_equal(got, whole[start : start + length])
  with pytest.raises(ValueError, match="not within"):
    tokens.read(len(whole) - 1, 2)


def test_an_epoch_has_every_window_once_and_its_own_order(config: DataConfig):
  config = dataclasses.replace(config, batch_size=1)
  tokens = Tokens(config.folder, "train")
  count = (len(tokens) - 1) // config.seq_len
  windows = [tokens.read(i * config.seq_len, config.seq_len + 1) for i in range(count)]
  data = open_dataset(config)
  first, second = take(data, count)[:, 0], take(data, count)[:, 0]
  order = lambda epoch: [row.tobytes() for row in epoch]  # noqa: E731
  assert sorted(order(first)) == sorted(order(second)) == sorted(order(windows))
  assert len({tuple(order(epoch)) for epoch in (windows, first, second)}) == 3
  other = open_dataset(dataclasses.replace(config, seed=1))
  assert order(take(other, count)[:, 0]) != order(first)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_readers_change_nothing_and_a_position_is_exact(config: DataConfig, workers: int):
  wanted = take(open_dataset(config), 150)
  data = open_dataset(dataclasses.replace(config, workers=workers))
  assert np.array_equal(take(data, 70), wanted[:70])
  state = data.get_state()
  assert np.array_equal(take(data, 5), wanted[70:75])
  again = open_dataset(config)
  again.set_state(state)
  assert np.array_equal(take(again, 80), wanted[70:])
  data.set_state(state)
  assert np.array_equal(take(data, 80), wanted[70:])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_batch(config: DataConfig, processes: int):
  whole = take(open_dataset(config, accumulation=2), 5)
  parts = [
    take(open_dataset(config, "train", i, processes, accumulation=2), 5) for i in range(processes)
  ]
  assert np.array_equal(np.concatenate(parts, axis=1), whole)
  middle = take(open_dataset(config, rows=Rows(1, 3), accumulation=2), 5)
  assert np.array_equal(middle, whole[:, 1:3])


@pytest.mark.parametrize("state", [{}, {"next_index": -1}, {"next_index": "3"}, {"a": 1}])
def test_a_position_that_is_none_is_refused(config: DataConfig, state: dict):
  with pytest.raises(ValueError, match="position in the data"):
    open_dataset(config).set_state(state)


def test_batches_that_cannot_be_are_refused(config: DataConfig):
  with pytest.raises(ValueError, match=r"valid split has \d+ windows of 512 tokens, fewer"):
    open_dataset(dataclasses.replace(config, seq_len=512), "valid")
  with pytest.raises(ValueError, match="does not divide among 3 processes"):
    open_dataset(config, "train", 0, 3)
  with pytest.raises(FileNotFoundError, match="neurojax data prepare"):
    open_dataset(dataclasses.replace(config, folder="/nowhere"))


@pytest.fixture
def copy(config: DataConfig, tmp_path: Path) -> Path:
  for file in Path(config.folder).iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  return tmp_path


def test_a_shard_that_is_cut_short_or_gone_is_named(copy: Path):
  shard = copy / "train-00002.bin"
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-1])
  with pytest.raises(ValueError, match=r"train-00002\.bin: 193 bytes.*97 tokens"):
    Tokens(copy, "train")
  shard.unlink()
  with pytest.raises(ValueError, match=r"train-00002\.bin: missing"):
    Tokens(copy, "train")
  shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
  Tokens(copy, "train")
  with pytest.raises(ValueError, match=r"train-00002\.bin: missing or not the bytes"):
    check_digests(copy)
  shard.write_bytes(whole)
  check_digests(copy)


@pytest.mark.parametrize(
  ("old", "new", "named"),
  [
    ('"format"', '"formar"', "not of format"),
    ('"uint16"', '"uint8"', "dtype"),
    ('"uint16"', '"uint32"', "contradict"),
    ('"train-00001.bin"', '"../train-00001.bin"', "no file of this folder"),
    ('"tokens": 97', '"tokens": 96', "add up"),
    ('"vocab_size"', '"vocabsize"', "unknown key"),
    ("{", "", "damaged"),
    ('"eos_id": 0', '"eos_id": 70000', "contradict"),
    ('"eos_id": 0', '"eos_id": null', "eos_id"),
  ],
)
def test_a_damaged_meta_json_is_refused_by_name(copy: Path, old: str, new: str, named: str):
  meta = copy / META
  text = meta.read_text()
  assert old in text
  meta.write_text(text.replace(old, new, 1))
  with pytest.raises(ValueError, match=rf"meta\.json: .*{named}"):
    Tokens(copy, "train")


def test_another_tokenizer_is_refused(copy: Path):
  spec = copy / "tokenizer.spec.json"
  spec.write_text(spec.read_text().replace('"add_bos": true', '"add_bos": false'))
  with pytest.raises(ValueError, match="digest"):
    read_spec(copy)


def test_ids_of_a_large_vocabulary_survive(tmp_path: Path):
  assert dtype_for(65536) == "uint16" and dtype_for(65537) == "uint32"
  ids = np.array([0, 65535, 65536, 2**31 - 1])
  writer = ShardWriter(tmp_path, "train", "uint32", shard_tokens=3)
  writer.write(ids)
  split = writer.finish()
  assert [shard.tokens for shard in split.shards] == [3, 1] and split.tokens == 4
  read = [np.fromfile(tmp_path / shard.file, "<u4") for shard in split.shards]
  assert np.array_equal(np.concatenate(read), ids)

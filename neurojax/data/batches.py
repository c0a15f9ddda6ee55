"""Reads batches of windows over prepared tokens, shuffled by seed and resumable to the very batch."""

import dataclasses
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Int32

from neurojax.data.token_shards import SplitName, Tokens

# No run takes so many batches.
_ENDLESS = 1 << 40


class Reading(Protocol):
  """The fields of `train.config.DataConfig` that say how data is read."""

  folder: str
  batch_size: int
  seq_len: int
  seed: int
  workers: int


class Windows:
  """Windows of seq_len + 1 tokens that begin every seq_len tokens.

  Each token is predicted once in an epoch, except those after the last whole window.
  """

  def __init__(self, tokens: Tokens, seq_len: int):
    self._tokens, self._length = tokens, seq_len
    self._count = (len(tokens) - 1) // seq_len

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> Int32[np.ndarray, "T+1"]:
    return self._tokens.read(int(index) * self._length, self._length + 1)


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows [first, end) of the global batch that one process reads."""

  first: int
  end: int


class Batches:
  """An endless iterator of int32 [rows, T+1], the given rows of each global batch.

  Row r of batch i is window i * batch_size + r of a sequence that goes through all windows in another
  order in each epoch. The seed alone sets the order, whatever the number of processes and readers.

  Attributes:
    epoch_batches: Batches in one epoch, a fraction.
  """

  def __init__(self, windows: Windows, batch_size: int, rows: Rows, seed: int, workers: int):
    shuffled = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()

    def read(batch: int) -> np.ndarray:
      first = batch * batch_size
      return np.stack([shuffled[first + row] for row in range(rows.first, rows.end)])

    dataset = grain.MapDataset.range(0, _ENDLESS).map(read)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    self._iterator = iter(dataset.to_iter_dataset(options))
    self.epoch_batches = len(windows) / batch_size

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> Int32[np.ndarray, "B T+1"]:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """Returns plain values with which `set_state` goes on with the batch that would have come next."""
    return dict(self._iterator.get_state())

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from a state of `get_state`. Raises: ValueError: it is none."""
    position = state.get("next_index")
    if set(state) != {"next_index"} or not isinstance(position, int) or position < 0:
      raise ValueError(f"position in the data is {state!r}; expected {{'next_index': a number}}")
    self._iterator.set_state(dict(state))


def open_dataset(
  config: Reading,
  split: SplitName = "train",
  process_index: int = 0,
  process_count: int = 1,
  *,
  accumulation: int = 1,
  rows: Rows | None = None,
) -> Batches:
  """Opens the batches of a prepared folder.

  Args:
    process_index, process_count: The equal share of each global batch to read, in order.
    accumulation: Batches joined into one: a global batch has accumulation * batch_size rows.
    rows: The rows to read instead of an equal share.
  Raises: FileNotFoundError or ValueError: no or damaged data, fewer windows than a batch has rows,
    a batch that does not divide among the processes.
  """
  batch_size = config.batch_size * accumulation
  if batch_size < 1 or config.seq_len < 1:
    raise ValueError(f"batch_size {config.batch_size}, seq_len {config.seq_len}: at least 1")
  if rows is None:
    if batch_size % process_count:
      raise ValueError(
        f"a batch of {batch_size} sequences does not divide among {process_count} processes:"
        " take a multiple"
      )
    share = batch_size // process_count
    rows = Rows(process_index * share, (process_index + 1) * share)
  windows = Windows(Tokens(config.folder, split), config.seq_len)
  if len(windows) < batch_size:
    raise ValueError(
      f"{config.folder}: the {split} split has {len(windows)} windows of {config.seq_len} tokens,"
      f" fewer than the {batch_size} of one batch: take a smaller batch, shorter windows or more text"
    )
  return Batches(windows, batch_size, rows, config.seed, config.workers)

"""A model that takes milliseconds, behind the loop's Program, and prepared data for it."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neurojax.data.batches import Rows
from neurojax.data.prepare import Preparation, partial_folder, prepare
from neurojax.train.config import DataConfig, TrainConfig
from tests.train import tiny

VOCAB = 300


def settings(data: Path) -> TrainConfig:
  """A run of twelve steps without evaluation."""
  return tiny.config(
    data=DataConfig(folder=str(data), batch_size=4, seq_len=16), steps=12, eval_batches=0,
    checkpoint_every=4, log_every=5,
  )  # fmt: skip


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Every record of a metrics.jsonl, in order."""
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_data(folder: Path, *, shard_tokens: int = 1 << 20, valid_fraction: float = 0.2) -> Path:
  """A folder of prepared data: a few thousand tokens of counting."""
  rng = np.random.default_rng(0)
  words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
  documents = [" ".join(rng.choice(words, 400)) for _ in range(20)]
  source = folder / "text.txt"
  source.write_text("\x1f".join(documents))
  plan = Preparation(
    inputs=(source,),
    separator="\x1f",
    valid_fraction=valid_fraction,
    vocab_size=VOCAB,
    shard_tokens=shard_tokens,
  )
  with partial_folder(folder / "data") as partial:
    prepare(plan, partial)
  return folder / "data"


class Bigrams:
  """Logits of the next token by a table; plain gradient descent."""

  flops_per_token = 6.0 * VOCAB
  peak_flops_per_s = None

  def __init__(self, *, learning_rate: float = 1.0):
    self._learning_rate = learning_rate
    self._step = jax.jit(self._train, donate_argnums=0)
    self._eval = jax.jit(_nats)
    self.seen: list[np.ndarray] = []

  def init_state(self):
    key = jax.random.key(0)
    table = 0.01 * jax.random.normal(key, (VOCAB, VOCAB), jnp.float32)
    return {"table_VV": table, "momentum_VV": jnp.zeros_like(table)}

  def abstract_state(self):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.init_state()
    )

  def rows(self, batch_size: int) -> Rows:
    return Rows(0, batch_size)

  def put(self, rows: Rows, local: np.ndarray, batch_size: int) -> jax.Array:
    assert local.shape[0] == batch_size and local.dtype == np.int32
    return jnp.asarray(local)

  def train_step(self, state, tokens):
    self.seen.append(np.asarray(tokens))
    bad = any(np.array_equal(self.seen[-1], batch) for batch in self._poisoned_batches)
    return self._step(state, tokens, jnp.float32(jnp.nan if bad else 1.0))

  def eval_step(self, state, tokens):
    return self._eval(state["table_VV"], tokens)

  _poisoned_batches: tuple[np.ndarray, ...] = ()

  def poison(self, *batches: np.ndarray) -> None:
    self._poisoned_batches = batches

  def _train(self, state, tokens, factor):
    def mean(table):
      nats, count = _nats(table, tokens)
      return factor * nats / count

    loss, grad = jax.value_and_grad(mean)(state["table_VV"])
    finite = jnp.isfinite(loss)
    momentum = 0.9 * state["momentum_VV"] + grad
    new = {"table_VV": state["table_VV"] - self._learning_rate * momentum,
           "momentum_VV": momentum}  # fmt: skip
    state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return state, {"loss": loss, "finite": finite.astype(jnp.float32)}


def _nats(table, tokens):
  logits = jax.nn.log_softmax(table[tokens[:, :-1]])
  nats = -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).sum()
  return nats, jnp.float32(tokens[:, 1:].size)

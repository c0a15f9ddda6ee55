"""Time `Int8Array.contract` beside a float32 dot.

The shapes are SmolLM2-135M's. The layers run in one `lax.scan` with nothing but their matrices, so
that every byte comes from memory as it does when a token is decoded. Weights and activations are
standard normal. Candidates take turns, and the fastest of many turns counts: the machine may be
shared.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from neurojax.kernels import timing
from neurojax.weights.int8 import Int8Array

LAYERS, D, F, V = 30, 576, 1536, 49152
MATRICES = {
  "qkv": ("BTD,DNH->BTNH", (D, 15, 64), 1),
  "out": ("BTNH,NHD->BTD", (9, 64, D), 2),
  "gate_up": ("BTD,DF->BTF", (D, 2 * F), 1),
  "down": ("BTF,FD->BTD", (F, D), 1),
}


def best_s(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
  """The least seconds of each call over interleaved turns, compilation left out."""
  best = {}
  for turn in range(turns + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      if turn:
        best[name] = min(best.get(name, np.inf), time.perf_counter() - start)
  return best


def layers(x_BxTxD: Array, weights: dict[str, Array | Int8Array]) -> Array:
  def product(name: str, x: Array, w: Array | Int8Array) -> Array:
    spec = MATRICES[name][0]
    return w.contract(spec, x) if isinstance(w, Int8Array) else jnp.einsum(spec, x, w)

  def layer(x: Array, w: dict[str, Array | Int8Array]) -> tuple[Array, None]:
    x = jnp.tanh(x + product("out", product("qkv", x, w["qkv"])[:, :, :9], w["out"]))
    hidden = product("gate_up", x, w["gate_up"])
    return x + product("down", jax.nn.silu(hidden[..., :F]) * hidden[..., F:], w["down"]), None

  return lax.scan(layer, x_BxTxD, weights)[0]


def head(x_BxTxD: Array, w_VxD: Array | Int8Array) -> Array:
  spec = "BTD,VD->BTV"
  return (
    w_VxD.contract(spec, x_BxTxD)
    if isinstance(w_VxD, Int8Array)
    else jnp.einsum(spec, x_BxTxD, w_VxD)
  )


def copy_rate() -> float:
  """Bytes/s, read and written, of all cores copying memory at once."""
  workers = os.cpu_count() or 1
  sources = [np.ones(2**27 // workers, np.float32) for _ in range(workers)]
  targets = [np.ones_like(source) for source in sources]
  with ThreadPoolExecutor(workers) as pool:
    seconds = best_s({"copy": lambda: list(pool.map(np.copyto, targets, sources))}, 10)["copy"]
  return 2 * sum(source.nbytes for source in sources) / seconds


def run(rows: Sequence[int], turns: int) -> None:
  """Print a table: every case at each number of activation rows, over `turns` turns."""
  rng = np.random.default_rng(0)

  def normal(shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32) / np.float32(fan_in**0.5)

  def stack(tree: object) -> object:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (LAYERS, *leaf.shape)).copy(), tree)

  floats = {n: normal(s, int(np.prod(s[:c]))) for n, (_, s, c) in MATRICES.items()}
  table = normal((V, D), D)
  cases = {
    "layers float32": (layers, stack({n: jnp.asarray(w) for n, w in floats.items()})),
    "layers int8": (
      layers,
      stack({n: Int8Array.quantize(w, MATRICES[n][2]) for n, w in floats.items()}),
    ),
    "head float32": (head, jnp.asarray(table)),
    "head int8": (head, Int8Array.quantize(table, -1)),
  }
  copy_bytes_per_s = copy_rate()
  where = timing.origin()
  print(
    f"{where['device']}, jax {where['jax']}, jaxlib {where['jaxlib']}, {where['date']};"
    f" bound: copy {copy_bytes_per_s / 1e9:.1f} GB/s (read and written)"
  )
  print(f"{'':16}{'rows':>5}{'ms':>9}{'GB/s':>7}{'of copy':>9}{'speed':>7}")
  for count in rows:
    x = jnp.asarray(rng.standard_normal((1, count, D), np.float32))
    calls = {
      name: lambda f=jax.jit(function), w=weights, x=x: f(x, w)
      for name, (function, weights) in cases.items()
    }
    seconds = best_s(calls, max(3, turns // max(1, count // 16)))
    for name, (_, weights) in cases.items():
      bytes_per_s = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) / seconds[name]
      baseline = seconds[name.replace("int8", "float32")]
      print(
        f"{name:16}{count:5}{seconds[name] * 1e3:9.2f}{bytes_per_s / 1e9:7.1f}"
        f"{bytes_per_s / copy_bytes_per_s:9.2f}{baseline / seconds[name]:7.2f}",
        flush=True,
      )

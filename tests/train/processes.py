"""One of two processes of `test_layout`: the losses it sees, and a digest of what is deployed."""

import json
import sys

import jax
import numpy as np

from neurojax.layout import Layout, sharding
from neurojax.train.deploy import deploy
from neurojax.train.step import make_train_step


def main(port: str, index: int) -> None:
  jax.config.update("jax_num_cpu_devices", 2)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
  from tests.train import tiny
  from tests.train.test_layout import STEPS, recipe

  config = recipe(Layout(data=2, tensor=2))
  mesh = config.layout.mesh()
  state, step = tiny.start(config), make_train_step(config, mesh)
  metrics = []
  for i in range(STEPS):
    rows = tiny.batch(config, i)
    half = len(rows) // 2
    tokens = jax.make_array_from_process_local_data(
      sharding(mesh, "BT"), rows[index * half : (index + 1) * half], rows.shape
    )
    state, found = step(state, tokens)
    metrics.append({name: float(value) for name, value in found.items()})
  leaves = jax.tree.leaves(deploy(state.params, config))
  digest = sum(float(np.asarray(leaf, np.float64).sum()) for leaf in leaves)
  print(json.dumps({"metrics": metrics, "digest": digest}))


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]))

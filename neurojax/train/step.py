"""One step of training, as a pure function of state and tokens, over any mesh.

state = init_state(config, mesh)
step = make_train_step(config, mesh)
state, metrics = step(state, tokens_BS)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from neurojax import layout
from neurojax.layout import BATCH
from neurojax.model import ends
from neurojax.model import params as places
from neurojax.model.attention import AttentionKind
from neurojax.model.loops import ScanBody
from neurojax.train import optimizer, parameters, pretrained
from neurojax.train.config import TrainConfig
from neurojax.train.loss import chunks_for, next_token_loss
from neurojax.train.parameters import Params

Metrics = dict[str, Float32[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The state that a run carries from step to step.

  Attributes:
    step: int32, number of steps taken, including those that a non-finite gradient made void.
    params: Float32 master weights, see `train.parameters`.
    opt_state: State of `optimizer.transform`.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  step: Any
  params: Any
  opt_state: Any


def abstract_state(config: TrainConfig, mesh: Mesh) -> State:
  """Makes the state with jax.ShapeDtypeStructs, which have shardings, in place of arrays."""

  def initial() -> State:
    weights = parameters.initial(config.model, config.seed)
    return State(
      jnp.zeros((), jnp.int32), weights, optimizer.transform(config.optimizer).init(weights)
    )

  def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # A leaf of the optimizer that stands under a parameter's name has its shape and its place.
    keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    names = [key for key in keys if key in places.LAYER or key in _OUTER]
    if names and leaf.shape == parameters.shape(config.model, names[-1]):
      where = parameters.where(mesh, names[-1])
    else:
      where = layout.replicated(mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  return jax.tree_util.tree_map_with_path(place, jax.eval_shape(initial))


_OUTER = {**places.FIRST, **places.LAST}


def init_state(config: TrainConfig, mesh: Mesh) -> State:
  """Makes the state before the first step, spread over the mesh; no device ever holds all of it.

  Weights are random, by `config.seed`, or those of the file `config.init_from`.
  Raises: as `pretrained.from_file` does.
  """
  abstract = abstract_state(config, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  if config.init_from is None:
    make = functools.partial(parameters.initial, config.model, config.seed)
    weights = jax.jit(make, out_shardings=shardings.params)()
  else:
    read = pretrained.from_file(config.init_from, config.model)
    weights = jax.tree.map(
      lambda w, where: jax.make_array_from_callback(w.shape, where, w.__getitem__),
      read,
      shardings.params,
    )
  init = jax.jit(optimizer.transform(config.optimizer).init, out_shardings=shardings.opt_state)
  # Not by device_put, whose result over several processes has no shards to save.
  step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=shardings.step)()
  return State(step, weights, init(weights))


def attention_kind(config: TrainConfig, mesh: Mesh) -> AttentionKind:
  """Chooses the attention that `config.attention` means on this mesh.

  Raises: ValueError: "cudnn" on another device than a CUDA GPU.
  """
  platform = mesh.devices.flat[0].platform
  on_gpu = platform in ("gpu", "cuda")
  if config.attention == "cudnn" and not on_gpu:
    raise ValueError(
      f"attention = 'cudnn': the devices are of kind {platform!r}: choose 'auto' or 'einsum'"
    )
  if config.attention != "auto":
    return config.attention
  return "cudnn" if on_gpu and config.compute_dtype == "bfloat16" else "einsum"


def make_train_step(
  config: TrainConfig, mesh: Mesh
) -> Callable[[State, Int32[Array, "B S"]], tuple[State, Metrics]]:
  """Makes a compiled step: (state, tokens) -> (state, metrics). The given state is consumed.

  Tokens are int32 [accumulation * batch_size, seq_len + 1], spread as batches are.
  Each window predicts all its tokens but the first; where documents meet in a window, attention runs
  across, and the model learns from the separator that what came before no longer counts.

  Metrics, float32: loss (nats per token, without z-loss), objective (with it), grad_norm (before
  clipping), learning_rate, weight_decay, finite (0 if loss or gradients held a NaN or an infinity:
  weights and optimizer are then as before, and the step counts), zeros (the fraction of a layer's
  weights that products saw as zero) and tokens.
  """
  abstract = abstract_state(config, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  loss = make_loss(config, mesh)

  def train_step(state: State, tokens_BS: Int32[Array, "B S"]) -> tuple[State, Metrics]:
    seen = parameters.effective(state.params, config)
    (objective, nats), gradients = _gradients(loss, seen, tokens_BS, config, shardings.params)
    gradients, norm = optimizer.clip(gradients, config.optimizer.clip_norm)
    finite = jnp.isfinite(objective) & jnp.isfinite(norm)
    rate = optimizer.learning_rate(config, state.step)
    decay = optimizer.weight_decay(config, state.step)
    updates, opt_state = optimizer.transform(config.optimizer).update(
      gradients, state.opt_state, state.params
    )
    moved = optimizer.move(state.params, updates, rate, decay)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    metrics = {
      "loss": nats,
      "objective": objective,
      "grad_norm": norm,
      "learning_rate": rate,
      "weight_decay": decay,
      "finite": finite,
      "zeros": _zeros(seen),
      "tokens": config.tokens_per_step,
    }
    state = State(state.step + 1, keep(moved, state.params), keep(opt_state, state.opt_state))
    return state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

  return jax.jit(
    train_step,
    in_shardings=(shardings, layout.sharding(mesh, "BT")),
    out_shardings=(shardings, layout.replicated(mesh)),
    donate_argnums=0,
  )


def make_eval_step(
  config: TrainConfig, mesh: Mesh
) -> Callable[[Params, Int32[Array, "B S"]], tuple[Float32[Array, ""], Float32[Array, ""]]]:
  """Makes a compiled evaluation: (params, tokens [batch_size, seq_len + 1]) -> (sum of nats, count)."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh).params)
  loss = make_loss(config, mesh)

  def eval_step(weights: Params, tokens_BS: Int32[Array, "B S"]):
    _, nats = loss(parameters.effective(weights, config), tokens_BS)
    count = tokens_BS.shape[0] * (tokens_BS.shape[1] - 1)
    return nats * count, jnp.float32(count)

  return jax.jit(
    eval_step,
    in_shardings=(shardings, layout.sharding(mesh, "BT")),
    out_shardings=layout.replicated(mesh),
  )


def make_loss(
  config: TrainConfig, mesh: Mesh
) -> Callable[[dict[str, Any], Int32[Array, "B S"]], tuple[Float32[Array, ""], Float32[Array, ""]]]:
  """Makes (effective parameters, tokens) -> (objective, cross-entropy): means over targets, in nats."""
  run = make_layers(config, mesh)
  model = config.model
  name = ends.head_name(model)

  def loss(seen: dict[str, Any], tokens_BS: Int32[Array, "B S"]):
    inputs_BT, targets_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
    x_BTD = ends.final_norm(run(seen, inputs_BT), seen["final_norm_D"], model.norm_eps)
    head = _gather(mesh, name, seen[name])
    # Logits are spread over the batch and over the vocabulary.
    chunks = chunks_for(
      inputs_BT.shape[0] // config.layout.batch_shards,
      inputs_BT.shape[1],
      model.vocab_size // config.layout.tensor,
    )
    return next_token_loss(
      x_BTD, head, targets_BT, parameters.letters(name), config.z_loss, chunks, mesh
    )

  return loss


def make_layers(
  config: TrainConfig, mesh: Mesh
) -> Callable[[dict[str, Any], Int32[Array, "B T"]], Float[Array, "B T D"]]:
  """Makes (effective parameters, token ids) -> activations after the last layer, in the compute dtype."""
  dtype = jnp.dtype(config.compute_dtype)
  graph, empty = parameters.layers(config.model, dtype.name, attention_kind(config, mesh))
  spread = NamedSharding(mesh, PartitionSpec(BATCH, None, None))

  def around(one: ScanBody) -> ScanBody:
    def spread_out(x_BTD: Array, given: tuple[Array, nnx.State]) -> tuple[Array, None]:
      index, numbers = given
      # Parameters that fsdp spreads are gathered here, layer by layer, and dropped after use.
      gathered = parameters.map_layer(functools.partial(_gather, mesh), numbers)
      x_BTD, _ = one(x_BTD, (index, gathered))
      return lax.with_sharding_constraint(x_BTD, spread), None

    return _rematerialized(spread_out, config.remat)

  def layers(seen: dict[str, Any], tokens_BT: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
    table = _gather(mesh, "embedding_VD", seen["embedding_VD"])
    x_BTD = lax.with_sharding_constraint(ends.embed(table, tokens_BT, dtype=dtype), spread)
    model = nnx.merge(graph, parameters.fill(empty, seen))
    return model.run_layers(x_BTD, around=around, unroll=config.unroll)[0]

  return layers


def _gather(mesh: Mesh, name: str, value: Any) -> Any:
  """Gathers a matrix along D; anything else stays as it is."""
  if not places.is_matrix(name):
    return value
  where = layout.sharding(mesh, name.rpartition("_")[2], gathered=True)
  return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, where), value)


_KEPT = ("dot_general", "rsqrt", "reduce_max")
"""Primitives whose results "dots" keeps: products, and from each norm and each rounding one number per token,
which saves a pass over the activations for next to no memory."""

_ATTENTION = "dot_product_attention_fwd"
"""Beginning of the names of cuDNN's attention primitives (jax._src.cudnn)."""


def _rematerialized(layer: Callable, remat: str) -> Callable:
  """Makes a layer keep less for the backward pass, which computes the rest anew."""
  if remat == "none":
    return layer

  def is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in _KEPT or primitive.name.startswith(_ATTENTION)

  policy = is_kept if remat == "dots" else jax.checkpoint_policies.nothing_saveable
  # Within a loop nothing can be merged with the forward pass, so no barrier is needed.
  return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _gradients(
  loss: Callable, seen: dict[str, Any], tokens_BS: Array, config: TrainConfig, shardings: Any
) -> tuple[tuple[Array, Array], Params]:
  """Computes means of objective and cross-entropy over the passes of a step, and float32 gradients.

  Gradients of the effective parameters count as those of the master weights: straight-through.
  """
  value_and_grad = jax.value_and_grad(loss, has_aux=True)

  def masters(gradients: dict[str, Any]) -> Params:
    found = {}
    for name, gradient in gradients.items():
      [leaf] = jax.tree.leaves(gradient)
      found[name] = lax.with_sharding_constraint(leaf.astype(jnp.float32), shardings[name])
    return found

  passes = config.accumulation
  if passes == 1:
    results, gradients = value_and_grad(seen, tokens_BS)
    return results, masters(gradients)
  # Rows a, a + passes and so on make pass a: each device takes them from its own rows.
  rows = tokens_BS.shape[0] // passes
  tokens_ABS = tokens_BS.reshape(rows, passes, -1).swapaxes(0, 1)

  def one(carry: tuple, tokens_BS: Array) -> tuple[tuple, None]:
    results, gradients = value_and_grad(seen, tokens_BS)
    return jax.tree.map(jnp.add, carry, (results, masters(gradients))), None

  zero = jnp.zeros((), jnp.float32)
  nothing = {
    name: jnp.zeros(parameters.shape(config.model, name), jnp.float32) for name in shardings
  }
  nothing = lax.with_sharding_constraint(nothing, shardings)
  (results, total), _ = lax.scan(one, ((zero, zero), nothing), tokens_ABS)
  return jax.tree.map(lambda x: x / passes, (results, total))


def _zeros(seen: dict[str, Any]) -> Float32[Array, ""]:
  matrices = [value.values for name, value in seen.items() if parameters.is_projection(name)]
  # Counted in int32 per matrix: a float32 would stop counting at 2**24.
  counts = [jnp.sum(w == 0, dtype=jnp.int32).astype(jnp.float32) for w in matrices]
  return sum(counts) / sum(w.size for w in matrices)

"""Memory of training against the state trees of optax and what JAX's linearization keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from hypothesis import given, settings

from neurojax import count
from neurojax.config import ModelConfig, Span
from neurojax.count import training
from neurojax.model.cache import Rows
from neurojax.model.neurollm import NeuroLLM
from tests.scaling.shapes import CONFIGS, configs


def nbytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def spans_of(config: ModelConfig) -> list[Span]:
  end = config.num_layers - 1
  return [
    Span(first_layer=first, last_layer=last, num_layers=config.num_layers)
    for first, last in {(0, end), (0, 0), (end, end), (min(1, end), max(0, end - 1)), (0, end // 2)}
    if first <= last
  ]


def muon_axes(tree):
  """Matrices of layers under Muon, flattened to two axes; the rest under AdamW."""

  def axes(path, leaf):
    name = str(path[-1].key)
    if path[0].key != "layers" or name == "scale_D":
      return None
    contracted = (1, 2) if name == "o_NHD" else (1,)
    output = tuple(axis for axis in range(1, leaf.ndim) if axis not in contracted)
    return optax.contrib.MuonDimensionNumbers(contracted, output)

  return jax.tree_util.tree_map_with_path(axes, tree)


def check_optimizers(config: ModelConfig) -> None:
  for span in spans_of(config):
    tree = nnx.to_pure_dict(nnx.state(NeuroLLM.abstract(config, span=span)))
    parameters = count.span_parameters(config, span)
    assert nbytes(tree) == 4 * parameters
    muon = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=muon_axes)
    for name, optimizer in (
      ("adamw", optax.adamw(1e-3)), ("muon", muon), ("sgd", optax.sgd(1e-3, momentum=0.9)),
    ):  # fmt: skip
      state = jax.eval_shape(optimizer.init, tree)
      assert nbytes(state) == training.optimizer_bytes(config, span, name), name
    step = training.train_bytes(config, span, batch=1, sequence=8, diloco=True)
    assert step.parameters == step.gradients == 4 * parameters
    assert step.copy == 2 * parameters and step.diloco == 8 * parameters
    assert step.working > 0
    fields = dataclasses.asdict(step)
    assert step.total == sum(fields.values())


@given(config=configs())
@settings(max_examples=4, deadline=None)
def test_optimizer_state_equals_optax_of_random_architectures(config: ModelConfig):
  check_optimizers(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_optimizer_state_equals_optax(path):
  check_optimizers(ModelConfig.load(path))


def kept_bytes(
  config: ModelConfig,
  span: Span,
  batch: int,
  sequence: int,
  *,
  remat: bool,
  dtype: str = "bfloat16",
) -> int:
  """Bytes that the vector-Jacobian product of a stage holds, its weights apart."""
  graph, state = nnx.split(NeuroLLM.abstract(config, span=span))
  ids = jax.ShapeDtypeStruct((batch, sequence), jnp.int32)
  inputs = (
    ids if span.is_first else jax.ShapeDtypeStruct((batch, sequence, config.model_dim), dtype)
  )

  def loss(state, inputs, ids):
    model = nnx.merge(graph, jax.tree.map(lambda a: a.astype(dtype), state))
    model.dtype = jnp.dtype(dtype)
    x_BTD = model.embed(inputs) if span.is_first else inputs
    position_BT = jnp.broadcast_to(jnp.arange(sequence, dtype=jnp.int32)[None], ids.shape)
    graph_layers, stacked = nnx.split(model.layers)

    def one(x_BTD, params):
      block = nnx.merge(graph_layers, params)
      return block(x_BTD, position_BT, None, jnp.int32(0), Rows(position_BT[:, 0]))[0], None

    x_BTD, _ = jax.lax.scan(jax.checkpoint(one) if remat else one, x_BTD, stacked)
    if not span.is_last:
      return x_BTD.astype(jnp.float32).sum()
    return -jnp.take_along_axis(jax.nn.log_softmax(model.logits(x_BTD)), ids[..., None], -1).mean()

  residuals = jax.eval_shape(lambda *given: jax.vjp(loss, *given)[1], state, inputs, ids)
  # Weights and norms' scales have no axis of tokens; shapes are chosen so that it shows.
  return nbytes(
    [r for r in jax.tree.leaves(residuals) if any(size % sequence == 0 for size in r.shape)]
  )


def odd(**changes) -> ModelConfig:
  # No width equals the sequence of 37 or a multiple of it.
  return ModelConfig(**{
    **dict(vocab_size=509, model_dim=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
           ffn_dim=200), **changes,
  })  # fmt: skip


@pytest.mark.parametrize("config", [
  odd(), odd(tied_embedding=False), odd(num_heads=6, num_kv_heads=6, head_dim=10, ffn_dim=51),
  odd(model_dim=70, num_kv_heads=1), odd(qk_norm=True), odd(sub_norm=True),
], ids=["tied", "untied", "no groups", "one key-value head", "normalized heads", "sub norms"])  # fmt: skip
def test_activations_are_what_linearization_keeps(config: ModelConfig):
  batch = 3
  for span in spans_of(config):
    counted = training.activation_bytes(config, span, batch=batch, sequence=37, remat=False)
    kept = kept_bytes(config, span, batch, 37, remat=False)
    logits = batch * 37 * config.vocab_size * 4 if span.is_last else 0
    assert counted == kept + logits, span


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_float32_keeps_no_more_and_rematerializing_keeps_the_inputs(path):
  config = dataclasses.replace(ModelConfig.load(path), vocab_size=1009)
  # No size of any named architecture is a multiple of 47.
  span, sequence = Span.whole(config), 47
  tokens = 2 * sequence
  kept = {
    remat: kept_bytes(config, span, 2, sequence, remat=remat, dtype="float32")
    for remat in (True, False)
  }
  wide = {
    remat: training.activation_bytes(
      config, span, batch=2, sequence=sequence, remat=remat, compute_dtype="float32"
    )
    for remat in (True, False)
  }
  assert 0.75 * wide[False] < kept[False] + tokens * 4 * config.vocab_size <= wide[False]
  assert kept[True] < wide[True] < wide[False]
  inputs = config.num_layers * tokens * config.model_dim * 4
  assert inputs <= kept[True] <= inputs + tokens * (12 * config.model_dim + 8 * config.vocab_size)


def test_what_is_kept_grows_with_everything_and_rejects_nothing():
  config = ModelConfig.named("tinyllama-1.1b")
  span = Span.whole(config)

  def kept(**changes) -> int:
    return training.activation_bytes(
      config, span, **{"batch": 1, "sequence": 512, "remat": True, **changes}
    )

  assert kept(batch=2) == 2 * kept()
  assert kept(sequence=1024) > 2 * kept()
  with pytest.raises(ValueError, match="batch = 0, sequence = 512"):
    kept(batch=0)


WIDE = odd(vocab_size=2048, model_dim=256, num_layers=6, num_heads=4, head_dim=64, ffn_dim=768)
OUTER = odd(vocab_size=8192, model_dim=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64,
            ffn_dim=512, tied_embedding=False)  # fmt: skip


@pytest.mark.parametrize(("config", "sequence", "remat", "dtype"), [
  (WIDE, 512, True, "float32"), (WIDE, 512, False, "float32"), (WIDE, 512, False, "bfloat16"),
  (OUTER, 128, True, "float32"), (OUTER, 128, True, "bfloat16"),
])  # fmt: skip
def test_a_compiled_step_takes_what_is_predicted(config, sequence: int, remat: bool, dtype: str):
  """Arguments, which are donated, and what comes out of them exactly; with temporaries within 5%."""
  graph, state = nnx.split(NeuroLLM.abstract(config))
  optimizer = optax.adamw(1e-3)
  ids = jax.ShapeDtypeStruct((2, sequence), jnp.int32)

  def loss(state, ids):
    model = nnx.merge(graph, jax.tree.map(lambda a: a.astype(dtype), state))
    model.dtype = jnp.dtype(dtype)
    graph_layers, stacked = nnx.split(model.layers)
    position_BT = jnp.broadcast_to(jnp.arange(sequence, dtype=jnp.int32)[None], ids.shape)

    def one(x_BTD, params):
      block = nnx.merge(graph_layers, params)
      return block(x_BTD, position_BT, None, jnp.int32(0), Rows(position_BT[:, 0]))[0], None

    x_BTD, _ = jax.lax.scan(jax.checkpoint(one) if remat else one, model.embed(ids), stacked)
    return -jnp.take_along_axis(jax.nn.log_softmax(model.logits(x_BTD)), ids[..., None], -1).mean()

  def step(state, moments, ids):
    updates, moments = optimizer.update(jax.grad(loss)(state, ids), moments, state)
    return optax.apply_updates(state, updates), moments

  moments = jax.eval_shape(optimizer.init, state)
  memory = (
    jax.jit(step, donate_argnums=(0, 1)).lower(state, moments, ids).compile().memory_analysis()
  )
  predicted = training.train_bytes(
    config,
    Span.whole(config),
    batch=2,
    sequence=sequence,
    remat=remat,
    compute_dtype=dtype,
    kind="cpu",
  )
  held = predicted.parameters + predicted.optimizer
  assert memory.argument_size_in_bytes == held + 2 * sequence * 4
  # A pointer for each array that comes out is counted with them.
  leaves = len(jax.tree.leaves((state, moments)))
  assert memory.output_size_in_bytes == held + 8 * leaves
  taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  if dtype == "bfloat16" and jax.version.__version_info__ >= (0, 11):
    # Where XLA:CPU keeps less in float32 than what is counted, which a host with an older jax needs.
    assert 0.95 * taken <= predicted.total < 1.5 * taken
  else:
    assert predicted.total == pytest.approx(taken, rel=0.05)

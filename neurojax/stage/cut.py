"""Cuts the layers of a span out of a whole model that is already in memory."""

import jax
from flax import nnx

from neurojax.config import Span
from neurojax.model import params
from neurojax.model.neurollm import NeuroLLM


def cut(model: NeuroLLM, span: Span) -> NeuroLLM:
  """Cut out the part of `model` that a stage holding `span` needs, by slicing its arrays.

  `files.load.load_span` loads a stage from a file without reading the rest.

  Raises: ValueError: the span belongs to another number of layers, or the model is itself a part.
  """
  if len(model.span) != model.config.num_layers:
    raise ValueError(f"the model to cut holds only layers {model.span}: cut the whole model")
  part = NeuroLLM.abstract(model.config, span=span, dtype=model.dtype)
  graph, state = nnx.split(part)
  whole = nnx.to_pure_dict(nnx.state(model))
  pure = {}
  stacks = model.stacks
  for stack in part.stacks.values():
    first = stacks[stack.name].layers.index(stack.layers[0])
    layers = slice(first, first + len(stack.layers))
    for _, path in params.stack_names(model.config, stack):
      value = jax.tree.map(lambda leaf, layers=layers: leaf[layers], params.get(whole, path))
      params.put(pure, path, value)
  for _, path in params.outer_names(model.config, span):
    params.put(pure, path, params.get(whole, path))
  nnx.replace_by_pure_dict(state, pure)
  return nnx.merge(graph, state)

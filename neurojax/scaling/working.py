"""What a stage's programs need beside weights and caches. Imports no JAX."""

from neurojax.config import ModelConfig
from neurojax.scaling import count
from neurojax.scaling.count import KEY_BLOCK, Weights


def working_bytes(config: ModelConfig, *, dtype: str, weights: Weights, tokens: int = 256) -> int:
  """About the working memory of the neediest program of a stage that is no end of the model.

  Of the model as it is (`stage.programs`), on a CPU. XLA's loop over layers copies a dense layer out
  of the stack, and int8 weights become floats one matrix at a time in prefill. Which buffers live at
  once is XLA's choice: the sums here are fitted to its own memory analysis, and tests hold them to it.

  Args:
    tokens: The longest input that is compiled.
  """
  d, f = config.model_dim, config.ffn_dim
  scores = config.num_heads * KEY_BLOCK
  if weights == "dense":
    layer = count.layer_bytes(config, dtype=dtype, weights=weights)
    return layer + tokens * 4 * (d + scores)
  if weights == "int8":
    return d * f * 4 + tokens * 4 * (3 * f + d + 2 * scores)
  return tokens * 4 * 3 * f

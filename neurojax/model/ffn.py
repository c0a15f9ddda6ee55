"""Feed-forward networks: one for every token, or a few chosen out of many."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from neurojax.config import Activation, ModelConfig
from neurojax.model.initial import normal
from neurojax.model.norm import RMSNorm
from neurojax.model.project import project, project_all
from neurojax.weights.matrix import layer


def activate(x: jax.Array, activation: Activation) -> jax.Array:
  """Applies the activation function that `ModelConfig.activation` names."""
  match activation:
    case "silu":
      return jax.nn.silu(x)
    case "gelu_tanh":
      return jax.nn.gelu(x, approximate=True)
    case "relu2":
      return jnp.square(jax.nn.relu(x))


class FFN(nnx.Module):
  """A gated feed-forward network: down(activation(gate(x)) * up(x)), arXiv:2002.05202, section 2.

  With `ModelConfig.sub_norm` the inner product is normalised.
  """

  def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    d, f = config.model_dim, config.ffn_dim
    self.activation = config.activation
    self.gate_DF = normal(rngs, (d, f), dtype)
    self.up_DF = normal(rngs, (d, f), dtype)
    self.down_FD = normal(rngs, (f, d), dtype)
    self.sub_norm = RMSNorm(f, eps=config.norm_eps, dtype=dtype) if config.sub_norm else None

  def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    gate_BTF, up_BTF = project_all(
      x_BTD, ("BTD,DF->BTF", self.gate_DF), ("BTD,DF->BTF", self.up_DF)
    )
    inner_BTF = activate(gate_BTF, self.activation) * up_BTF
    if self.sub_norm is not None:
      inner_BTF = self.sub_norm(inner_BTF)
    return project("BTF,FD->BTD", inner_BTF, self.down_FD)


class Experts(nnx.Module):
  """A mixture of FFNs: a router chooses a few for each token and weighs them by its softmax over those.

  Every expert that a token chose is computed: there is no capacity beyond which tokens are dropped.
  Source: arXiv:2401.04088, section 2.1.
  """

  def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    d, f, e = config.model_dim, config.ffn_dim, config.num_experts
    self.activation, self.num_experts = config.activation, e
    self.per_token = config.experts_per_token
    self.router_DE = normal(rngs, (d, e), dtype)
    self.gate_EDF = normal(rngs, (e, d, f), dtype)
    self.up_EDF = normal(rngs, (e, d, f), dtype)
    self.down_EFD = normal(rngs, (e, f, d), dtype)

  def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    logits_ME = project("BTD,DE->BTE", x_MD[None], self.router_DE, dtype=jnp.float32)[0]
    top_MC, chosen_MC = lax.top_k(logits_ME, self.per_token)
    weight_MC = jax.nn.softmax(top_MC, axis=-1)
    pairs = x_MD.shape[0] * self.per_token
    # Few tokens read no expert but their own; of many, most experts have some.
    run = self._each_choice if pairs <= self.num_experts else self._each_expert
    return run(x_MD, chosen_MC, weight_MC).astype(x_BTD.dtype).reshape(x_BTD.shape)

  def _each_choice(
    self, x_MD: Float[Array, "M D"], chosen_MC: Int[Array, "M C"], weight_MC: Float[Array, "M C"]
  ) -> Float[Array, "M D"]:
    def one(i: jax.Array, y_MD: jax.Array) -> jax.Array:
      row, choice = i // self.per_token, i % self.per_token
      x_1D = lax.dynamic_slice_in_dim(x_MD, row, 1)
      out_1D = self._expert(chosen_MC[row, choice], x_1D) * weight_MC[row, choice]
      return y_MD.at[row].add(out_1D[0])

    return lax.fori_loop(0, chosen_MC.size, one, jnp.zeros(x_MD.shape, jnp.float32))

  def _each_expert(
    self, x_MD: Float[Array, "M D"], chosen_MC: Int[Array, "M C"], weight_MC: Float[Array, "M C"]
  ) -> Float[Array, "M D"]:
    def one(expert: jax.Array, y_MD: jax.Array) -> jax.Array:
      is_own_MC = chosen_MC == expert
      weight_M = jnp.where(is_own_MC, weight_MC, 0).sum(axis=-1)
      out_MD = self._expert(expert, x_MD) * weight_M[:, None]
      return y_MD + jnp.where(is_own_MC.any(axis=-1)[:, None], out_MD, 0)

    return lax.fori_loop(0, self.num_experts, one, jnp.zeros(x_MD.shape, jnp.float32))

  def _expert(self, expert: Int[Array, ""], x_MD: Float[Array, "M D"]) -> Float[Array, "M D"]:
    gate, up, down = (
      layer(param.get_value(), expert) for param in (self.gate_EDF, self.up_EDF, self.down_EFD)
    )
    x_BTD = x_MD[None]
    gate_BTF, up_BTF = project_all(x_BTD, ("BTD,DF->BTF", gate), ("BTD,DF->BTF", up))
    inner_BTF = activate(gate_BTF, self.activation) * up_BTF
    return project("BTF,FD->BTD", inner_BTF, down, dtype=jnp.float32)[0]

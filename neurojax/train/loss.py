"""The loss of next tokens, computed without ever holding all logits."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from neurojax.layout import BATCH

LOGIT_BYTES = 1 << 29
"""Bytes of float32 logits that a device holds at once."""


def chunks_for(batch: int, length: int, vocab_size: int) -> int:
  """Number of parts in which the positions of `batch` sequences on a device are taken.

  It is the least divisor of `length` with which a part's logits fit LOGIT_BYTES.
  """
  least = max(1, math.ceil(4 * batch * length * vocab_size / LOGIT_BYTES))
  return next(n for n in range(min(least, length), length + 1) if length % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def next_token_loss(
  x_BTD: Float[Array, "B T D"],
  head: Float32[Array, "V D"] | Float32[Array, "D V"],
  targets_BT: Int32[Array, "B T"],
  axes: str,
  z_loss: float,
  chunks: int,
  mesh: Mesh | None,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
  """Computes the mean cross-entropy of the targets under softmax(x head), in nats, and the objective.

  Products are in the dtype of x, all else is float32. The gradients are formed in the forward pass,
  chunk by chunk while its logits are there, so that nothing is computed twice and the products are
  those that 6 N counts: one forward, two backward.

  Args:
    x_BTD: Normalised activations of the last layer.
    head: Rounded to the dtype of x; its gradient is summed in float32.
    axes: "VD" for a tied embedding, "DV" for a head of its own.
    z_loss: Weight of the mean of log(Z)**2, which keeps logits small (arXiv:2204.02311, section 5).
    chunks: Parts of T, a divisor; see `chunks_for`.
    mesh: Keeps logits spread as the batch and the vocabulary are; None: one device.
  Returns: The objective, cross-entropy plus z-loss, and the cross-entropy alone, which has no
    gradient.
  """
  objective, nats, _ = _run(x_BTD, head, targets_BT, axes, z_loss, chunks, mesh, gradients=False)
  return objective, nats


def _run(x_BTD, head, targets_BT, axes, z_loss, chunks, mesh, *, gradients):
  batch, length, width = x_BTD.shape
  dtype = x_BTD.dtype
  w = head.astype(dtype)
  precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
  dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
  size = length // chunks
  x_CBTD = x_BTD.reshape(batch, chunks, size, width).swapaxes(0, 1)
  y_CBT = targets_BT.reshape(batch, chunks, size).swapaxes(0, 1)
  count = batch * length

  def chunk(carry, given):
    x, y = given
    logits = _spread(dot(f"BTD,{axes}->BTV", x, w), mesh)
    top = logits.max(axis=-1, keepdims=True)
    log_z = top + jnp.log(jnp.exp(logits - top).sum(axis=-1, keepdims=True))
    vocab = lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    is_target = vocab == y[..., None]
    at_target = jnp.where(is_target, logits, 0).sum(axis=-1)
    nats = (log_z[..., 0] - at_target).sum()
    squares = (log_z * log_z).sum()
    carry = {**carry, "nats": carry["nats"] + nats, "squares": carry["squares"] + squares}
    if not gradients:
      return carry, None
    d = jnp.exp(logits - log_z) * (1 + 2 * z_loss * log_z) - is_target
    d = _spread((d / count).astype(dtype), mesh)
    dx = dot(f"BTV,{axes}->BTD", d, w).astype(dtype)
    carry["dw"] = carry["dw"] + dot(f"BTD,BTV->{axes}", x, d)
    return carry, dx

  zero = jnp.zeros((), jnp.float32)
  carry = {"nats": zero, "squares": zero}
  if gradients:
    carry["dw"] = jnp.zeros(head.shape, jnp.float32)
  carry, dx_CBTD = lax.scan(chunk, carry, (x_CBTD, y_CBT))
  nats = carry["nats"] / count
  objective = nats + z_loss * carry["squares"] / count
  if not gradients:
    return objective, nats, None
  return objective, nats, (dx_CBTD.swapaxes(0, 1).reshape(x_BTD.shape), carry["dw"])


def _forward(x_BTD, head, targets_BT, axes, z_loss, chunks, mesh):
  objective, nats, kept = _run(x_BTD, head, targets_BT, axes, z_loss, chunks, mesh, gradients=True)
  return (objective, nats), kept


def _backward(axes, z_loss, chunks, mesh, kept, given):
  dx_BTD, dw = kept
  scale = given[0]
  return (dx_BTD * scale).astype(dx_BTD.dtype), dw * scale, None


next_token_loss.defvjp(_forward, _backward)


def _spread(logits_BTV: Array, mesh: Mesh | None) -> Array:
  if mesh is None:
    return logits_BTV
  return lax.with_sharding_constraint(
    logits_BTV, NamedSharding(mesh, PartitionSpec(BATCH, None, "tensor"))
  )

"""The loss against float64, its gradients against autodiff of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.train.loss import LOGIT_BYTES, chunks_for, next_token_loss

B, T, D, V = 3, 12, 8, 37
RNG = np.random.default_rng(0)
X_BTD = RNG.standard_normal((B, T, D)).astype(np.float32)
W_VD = RNG.standard_normal((V, D)).astype(np.float32)
Y_BT = RNG.integers(0, V, (B, T)).astype(np.int32)


def plain(x_BTD, w_VD, z_loss):
  logits = jnp.einsum("BTD,VD->BTV", x_BTD, w_VD, precision="highest")
  log_z = jax.nn.logsumexp(logits, axis=-1)
  nats = log_z - jnp.take_along_axis(logits, jnp.asarray(Y_BT)[..., None], -1)[..., 0]
  return nats.mean() + z_loss * (log_z**2).mean()


@pytest.mark.parametrize("chunks", [1, 3, 12])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("axes", ["VD", "DV"])
def test_value_and_gradients(chunks: int, z_loss: float, axes: str):
  head = W_VD if axes == "VD" else W_VD.T

  def ours(x, w):
    return next_token_loss(x, w, jnp.asarray(Y_BT), axes, z_loss, chunks, None)

  (objective, nats), (dx, dw) = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(
    jnp.asarray(X_BTD), jnp.asarray(head)
  )
  logits = np.einsum("btd,vd->btv", X_BTD.astype(np.float64), W_VD)
  log_z = np.log(np.exp(logits).sum(-1))
  wanted = (log_z - np.take_along_axis(logits, Y_BT[..., None], -1)[..., 0]).mean()
  np.testing.assert_allclose(nats, wanted, rtol=1e-6)
  np.testing.assert_allclose(objective, wanted + z_loss * (log_z**2).mean(), rtol=1e-6)
  dx_wanted, dw_wanted = jax.grad(plain, argnums=(0, 1))(X_BTD, W_VD, z_loss)
  np.testing.assert_allclose(dx, dx_wanted, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(dw, dw_wanted if axes == "VD" else dw_wanted.T, rtol=1e-4, atol=1e-6)


def test_without_gradients_the_value_is_the_same():
  x, w, y = map(jnp.asarray, (X_BTD, W_VD, Y_BT))
  alone = next_token_loss(x, w, y, "VD", 0.1, 3, None)
  (objective, nats), _ = jax.value_and_grad(
    lambda x: next_token_loss(x, w, y, "VD", 0.1, 3, None), has_aux=True
  )(x)
  assert alone == (objective, nats)


def test_large_logits_do_not_overflow():
  x, w, y = map(jnp.asarray, (X_BTD * 1e3, W_VD * 1e3, Y_BT))
  value, dx = jax.value_and_grad(lambda x: next_token_loss(x, w, y, "VD", 0.0, 1, None)[0])(x)
  assert jnp.isfinite(value) and jnp.isfinite(dx).all()


def test_chunks_divide_the_length_and_keep_to_the_bytes():
  assert chunks_for(1, 8, 100) == 1
  for batch, length, vocab in ((8, 2048, 32768), (16, 1000, 50304), (64, 97, 1 << 20)):
    chunks = chunks_for(batch, length, vocab)
    assert length % chunks == 0
    assert 4 * batch * length // chunks * vocab <= LOGIT_BYTES or chunks == length

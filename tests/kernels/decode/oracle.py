"""The decode step in float64 numpy, and random weights for it."""

import numpy as np

from neurojax.kernels.decode.shapes import Shape
from neurojax.kernels.decode.weights import LayerWeights
from neurojax.weights.ternary import TernaryArray


def matrix(rng: np.random.Generator, *lead: int, n: int, k: int, group: int) -> TernaryArray:
  codes = np.zeros((*lead, n, -(-k // 64) * 16), np.uint8)
  for field in range(4):
    codes |= rng.integers(0, 3, codes.shape, np.uint8) << np.uint8(2 * field)
  scales = rng.uniform(0.7, 1.3, (*lead, n, -(-k // group))) * 1.4 / k**0.5
  return TernaryArray(codes, scales.astype(np.float16), (k, n), 1, group, "w2a8")


def weights(shape: Shape, *, layers: int, group: int, qk_norm: bool, seed: int) -> LayerWeights:
  rng = np.random.default_rng(seed)
  s = shape

  def gain(width: int) -> np.ndarray:
    return rng.normal(1, 0.1, (layers, width)).astype(np.float32)

  return LayerWeights(
    qkv=matrix(rng, layers, n=(s.n + 2 * s.k) * s.h, k=s.d, group=group),
    o=matrix(rng, layers, n=s.d, k=s.n * s.h, group=group),
    gate_up=matrix(rng, layers, n=2 * s.f, k=s.d, group=group),
    down=matrix(rng, layers, n=s.d, k=s.f, group=group),
    attn_norm=gain(s.d),
    ffn_norm=gain(s.d),
    q_norm=gain(s.h) if qk_norm else None,
    k_norm=gain(s.h) if qk_norm else None,
    shape=s,
  )


def dense(w: TernaryArray) -> np.ndarray:
  codes = np.asarray(w.codes)
  fields = np.stack([codes >> np.uint8(2 * j) & 3 for j in range(4)], -1)
  rows = fields.reshape(*codes.shape[:-1], -1).astype(np.float64) - 1
  return rows * np.repeat(np.asarray(w.scales, np.float64), w.group_size, -1)[..., : rows.shape[-1]]


def rounded(v: np.ndarray) -> np.ndarray:
  """As int8 with one scale for the vector."""
  top = np.abs(v).max()
  return np.rint(v * (127 / top)) * top / 127 if top else v


def norm(v: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
  return v / np.sqrt((v * v).mean(-1, keepdims=True) + eps) * np.asarray(gain, np.float64)


def step(x, w: LayerWeights, keys, values, cos, sin, position: int, final_norm, head):
  """x, logits, keys and values, as `decode` returns them."""
  s = w.shape
  x, keys, values = (np.array(a, np.float64) for a in (x, keys, values))
  matrices = {name: dense(getattr(w, name)) for name in ("qkv", "o", "gate_up", "down")}

  def turn(a: np.ndarray) -> np.ndarray:
    z = (a[:, : s.h // 2] + 1j * a[:, s.h // 2 :]) * (cos + 1j * sin)
    return np.concatenate([z.real, z.imag], axis=-1)

  for layer in range(w.num_layers):
    h = rounded(norm(x, w.attn_norm[layer], s.norm_eps))
    heads = (matrices["qkv"][layer] @ h).reshape(-1, s.h)
    q, k, v = np.split(heads, [s.n, s.n + s.k])
    if w.q_norm is not None:
      q, k = norm(q, w.q_norm[layer], s.norm_eps), norm(k, w.k_norm[layer], s.norm_eps)
    q, k = turn(q), turn(k)
    keys[layer, 0, :, position], values[layer, 0, :, position] = k, v
    seen = slice(0, position + 1)
    score = np.einsum("kgh,ksh->kgs", q.reshape(s.k, s.g, s.h), keys[layer, 0, :, seen])
    weight = np.exp(score * s.h**-0.5)
    weight /= weight.sum(-1, keepdims=True)
    out = np.einsum("kgs,ksh->kgh", weight, values[layer, 0, :, seen]).reshape(-1)
    x = x + matrices["o"][layer] @ rounded(out)
    h = rounded(norm(x, w.ffn_norm[layer], s.norm_eps))
    gate, up = np.split(matrices["gate_up"][layer] @ h, 2)
    x = x + matrices["down"][layer] @ rounded(gate / (1 + np.exp(-gate)) * up)
  return x, dense(head) @ rounded(norm(x, final_norm, s.norm_eps)), keys, values

"""Architectures for the tests of this folder."""

from pathlib import Path

from hypothesis import strategies as st

from neurojax.config import ModelConfig

EVERY = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.toml"))
CONFIGS = [path for path in EVERY if not ModelConfig.load(path).beyond_plain()]
"""Those of the plain decoder, which training and much of sizing are about."""


@st.composite
def configs(draw) -> ModelConfig:
  """Small architectures of every kind that is valid, odd widths included."""
  groups, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
  return ModelConfig(
    vocab_size=draw(st.integers(2, 600)),
    model_dim=draw(st.integers(1, 150)),
    num_layers=draw(st.integers(1, 6)),
    num_heads=groups * kv_heads,
    num_kv_heads=kv_heads,
    head_dim=2 * draw(st.integers(1, 40)),
    ffn_dim=draw(st.integers(1, 300)),
    tied_embedding=draw(st.booleans()),
    qk_norm=draw(st.booleans()),
    sub_norm=draw(st.booleans()),
  )

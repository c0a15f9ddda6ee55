"""Architectures by name: those of published models, for use without their files, and our own.

python -m neurojax.scaling.presets bonsai-8b configs/model/bonsai-8b.toml

The numbers of published ones are those of each model's published config.json (Hugging Face's names in brackets): model_dim
[hidden_size], num_layers [num_hidden_layers], ffn_dim [intermediate_size], rope_base [rope_theta],
norm_eps [rms_norm_eps], context_length [max_position_embeddings unless a note says otherwise].
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neurojax.config import LayerKind, ModelConfig, RopeScaling, to_toml

_GAP = """one of the sizes of experiments/ternary_gap. Heads of 64, an
FFN three times as wide as the model, a norm in front of every matrix (BitNet b1.58, arXiv:2402.17764).
Contracted widths are multiples of 128, the group of Q2_0."""
_MFU = """for experiments/train_mfu. Heads of 128, a norm in front of every matrix
(BitNet b1.58, arXiv:2402.17764); contracted widths are multiples of 256, the group of TQ2_0."""


def _own(
  parameters: str, experiment: str, dim: int, layers: int, kv_heads: int
) -> tuple[str, ModelConfig]:
  """An architecture of our own family: an FFN three times as wide as the model, and a norm in front of every
  matrix."""
  small = experiment is _GAP
  head_dim = 64 if small else 128
  config = ModelConfig(
    vocab_size=8192 if small else 32768,
    model_dim=dim,
    num_layers=layers,
    num_heads=dim // head_dim,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    ffn_dim=3 * dim,
    context_length=1024 if small else 2048,
    sub_norm=True,
  )
  return f"{parameters}{' without the embedding' if small else ''}, {experiment}", config


def _gemma(**fields: Any) -> ModelConfig:
  """An architecture with the fields that Gemma-3-27B and Gemma-4-31B share."""
  return ModelConfig(
    model_dim=5376,
    num_heads=32,
    num_kv_heads=16,
    ffn_dim=21504,
    rope_base=1e6,
    activation="gelu_tanh",
    qk_norm=True,
    post_norm=True,
    embedding_scale=5376**0.5,
    layer_pattern=(0, 0, 0, 0, 0, 1),
    **fields,
  )


PRESETS: Mapping[str, tuple[str, ModelConfig]] = {
  "bonsai-1.7b": (
    "Qwen3-1.7B, arXiv:2505.09388: the shape of Ternary-Bonsai-1.7B.",
    ModelConfig(
      vocab_size=151936,
      model_dim=2048,
      num_layers=28,
      num_heads=16,
      num_kv_heads=8,
      head_dim=128,
      ffn_dim=6144,
      context_length=40960,
      rope_base=1e6,
      qk_norm=True,
    ),
  ),
  "bonsai-4b": (
    "Qwen3-4B, arXiv:2505.09388: the shape of Ternary-Bonsai-4B.",
    ModelConfig(
      vocab_size=151936,
      model_dim=2560,
      num_layers=36,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      ffn_dim=9728,
      context_length=40960,
      rope_base=1e6,
      qk_norm=True,
    ),
  ),
  "bonsai-8b": (
    "Qwen3-8B, arXiv:2505.09388: the shape of Ternary-Bonsai-8B. The latter stretches its positions\n"
    "(YaRN), which this configuration does not.",
    ModelConfig(
      vocab_size=151936,
      model_dim=4096,
      num_layers=36,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      ffn_dim=12288,
      context_length=40960,
      rope_base=1e6,
      tied_embedding=False,
      qk_norm=True,
    ),
  ),
  "qwen3-8b-yarn": (
    "Qwen3-8B, arXiv:2505.09388, with its positions stretched four times (YaRN), as its model card has\n"
    "it for long texts.",
    ModelConfig(
      vocab_size=151936,
      model_dim=4096,
      num_layers=36,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      ffn_dim=12288,
      context_length=131072,
      rope_base=1e6,
      rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_context_length=32768),
      tied_embedding=False,
      qk_norm=True,
    ),
  ),
  "llama-8b": (
    "Llama-3.1-8B, arXiv:2407.21783: the shape of its ternary versions. The original stretches its\n"
    "positions past 8192, which this configuration does not; its rotary pairs are neighbours, as in the\n"
    "GGUF files of the family.",
    ModelConfig(
      vocab_size=128256,
      model_dim=4096,
      num_layers=32,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      ffn_dim=14336,
      context_length=8192,
      rope_base=5e5,
      rope_style="interleaved",
      norm_eps=1e-5,
      tied_embedding=False,
    ),
  ),
  "llama-2-7b": (
    "Llama-2-7B, arXiv:2307.09288: as many key-value heads as heads.",
    ModelConfig(
      vocab_size=32000,
      model_dim=4096,
      num_layers=32,
      num_heads=32,
      num_kv_heads=32,
      head_dim=128,
      ffn_dim=11008,
      context_length=4096,
      norm_eps=1e-5,
      tied_embedding=False,
    ),
  ),
  "tinyllama-1.1b": (
    "TinyLlama-1.1B, arXiv:2401.02385. Rotary pairs are neighbours, as in the GGUF files of the Llama\n"
    "family.",
    ModelConfig(
      vocab_size=32000,
      model_dim=2048,
      num_layers=22,
      num_heads=32,
      num_kv_heads=4,
      head_dim=64,
      ffn_dim=5632,
      context_length=2048,
      rope_style="interleaved",
      norm_eps=1e-5,
      tied_embedding=False,
    ),
  ),
  "llama-3.1-8b": (
    "Llama-3.1-8B, arXiv:2407.21783, with its rotary positions stretched.",
    ModelConfig(
      vocab_size=128256,
      model_dim=4096,
      num_layers=32,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      ffn_dim=14336,
      context_length=131072,
      rope_base=5e5,
      rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context_length=8192),
      norm_eps=1e-5,
      tied_embedding=False,
    ),
  ),
  "mistral-7b": (
    "Mistral-7B-v0.1, arXiv:2310.06825.",
    ModelConfig(
      vocab_size=32000,
      model_dim=4096,
      num_layers=32,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      ffn_dim=14336,
      context_length=32768,
      sliding_window=4096,
      norm_eps=1e-5,
      tied_embedding=False,
    ),
  ),
  "mistral-nemo-12b": (
    "Mistral-Nemo-Base-2407: heads narrower than model_dim / num_heads, no window.",
    ModelConfig(
      vocab_size=131072,
      model_dim=5120,
      num_layers=40,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      ffn_dim=14336,
      context_length=128000,
      rope_base=1e6,
      norm_eps=1e-5,
      tied_embedding=False,
    ),
  ),
  "falcon3-7b": (
    "Falcon3-7B, whose 1.58-bit version has the same shape: heads of 256.",
    ModelConfig(
      vocab_size=131072,
      model_dim=3072,
      num_layers=28,
      num_heads=12,
      num_kv_heads=4,
      head_dim=256,
      ffn_dim=23040,
      context_length=32768,
      rope_base=1000042.0,
      tied_embedding=False,
    ),
  ),
  "qwen2.5-7b": (
    "Qwen2.5-7B, arXiv:2412.15115.",
    ModelConfig(
      vocab_size=152064,
      model_dim=3584,
      num_layers=28,
      num_heads=28,
      num_kv_heads=4,
      head_dim=128,
      ffn_dim=18944,
      context_length=32768,
      rope_base=1e6,
      qkv_bias=True,
      tied_embedding=False,
    ),
  ),
  "gemma-3-27b": (
    "Gemma-3-27B, arXiv:2503.19786, its text model: five layers with a window, one without.",
    _gemma(
      num_layers=62,
      head_dim=128,
      context_length=131072,
      vocab_size=262208,
      attention_scale=168**-0.5,
      layer_kinds=(
        LayerKind(sliding_window=1024, rope_base=1e4),
        LayerKind(rope_scaling=RopeScaling(kind="linear", factor=8.0)),
      ),
    ),
  ),
  "gemma-4-31b": (
    "Gemma-4-31B, its text model: layers without a window have wider and fewer heads, whose values are\n"
    "their keys, and turn a quarter of their pairs.",
    _gemma(
      num_layers=60,
      head_dim=256,
      context_length=262144,
      vocab_size=262144,
      attention_scale=1.0,
      logit_softcap=30.0,
      v_norm=True,
      layer_scale=True,
      layer_kinds=(
        LayerKind(sliding_window=1024, rope_base=1e4),
        LayerKind(
          head_dim=512,
          num_kv_heads=4,
          shared_kv=True,
          rope_scaling=RopeScaling(kind="proportional", rotated=0.25),
        ),
      ),
    ),
  ),
  "lfm2-1.2b": (
    "LFM2-1.2B and LFM2.5-1.2B, arXiv:2511.23404: ten short convolutions, six layers of attention.",
    ModelConfig(
      vocab_size=65536,
      model_dim=2048,
      num_layers=16,
      num_heads=32,
      num_kv_heads=8,
      head_dim=64,
      ffn_dim=8192,
      context_length=128000,
      rope_base=1e6,
      norm_eps=1e-5,
      qk_norm=True,
      conv_width=3,
      layer_kinds=(LayerKind(mixer="convolution"), LayerKind()),
      layer_pattern=(0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0),
    ),
  ),
  "bitnet-2b": (
    "BitNet b1.58 2B4T, arXiv:2504.12285.",
    ModelConfig(
      vocab_size=128256,
      model_dim=2560,
      num_layers=30,
      num_heads=20,
      num_kv_heads=5,
      head_dim=128,
      ffn_dim=6912,
      context_length=4096,
      rope_base=5e5,
      norm_eps=1e-5,
      sub_norm=True,
      activation="relu2",
    ),
  ),
  "neurollm-3m": _own("3.1 million parameters", _GAP, 256, 4, 2),
  "neurollm-10m": _own("10.3 million parameters", _GAP, 384, 6, 2),
  "neurollm-30m": _own("31.5 million parameters", _GAP, 512, 10, 4),
  "neurollm-100m": _own("96.3 million parameters", _GAP, 768, 14, 4),
  "neurollm-350m": _own("336 million parameters", _MFU, 1024, 24, 4),
  "neurollm-1b": _own("1.03 billion parameters", _MFU, 2048, 20, 4),
}


def text(name: str, path: str) -> str:
  """A configuration file, its first line the command that writes it.

  Raises: ValueError: no preset is called so.
  """
  if name not in PRESETS:
    raise ValueError(f"preset {name!r}: choose one of {', '.join(PRESETS)}")
  note, config = PRESETS[name]
  lines = [f"python -m neurojax.scaling.presets {name} {path}", *note.splitlines()]
  return "".join(f"# {line}\n" for line in lines) + to_toml(config)


def _main(name: str, path: str) -> None:
  Path(path).write_text(text(name, path), encoding="utf-8")


if __name__ == "__main__":
  import tyro

  tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(_main))

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurojax.config import ModelConfig, Sampling, Span, architectures, from_toml, to_toml
from neurojax.scaling.fleet import Fleet, Host

CONFIG = ModelConfig(
  vocab_size=97, model_dim=32, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48
)


@given(
  kv=st.integers(1, 8),
  group=st.integers(1, 4),
  half=st.integers(1, 64),
  style=st.sampled_from(["half", "interleaved"]),
  base=st.floats(1.5, 1e7),
  tied=st.booleans(),
  norm=st.booleans(),
)
def test_toml_round_trip(
  kv: int, group: int, half: int, style: str, base: float, tied: bool, norm: bool
):
  config = dataclasses.replace(
    CONFIG,
    num_kv_heads=kv,
    num_heads=kv * group,
    head_dim=2 * half,
    rope_style=style,
    rope_base=base,
    tied_embedding=tied,
    qk_norm=norm,
  )
  assert from_toml(ModelConfig, to_toml(config)) == config


def test_nested_toml_round_trip_leaves_out_what_is_absent():
  fleet = Fleet(
    hosts=(Host(address="127.0.0.1:1", memory_bytes=5), Host(address="[::1]:2", name="b"))
  )
  text = to_toml(fleet)
  assert from_toml(Fleet, text) == fleet
  assert "None" not in text and text.count("name") == 1


@pytest.mark.parametrize(
  ("text", "wanted"),
  [
    ("vocab_size = 3\nhidden = 4", "unknown key 'hidden'"),
    ("vocab_size = 3", "missing key"),
    ("vocab_size = ", "not valid TOML"),
    (to_toml(CONFIG).replace("vocab_size = 97", 'vocab_size = "97"'), "expected int, got str"),
    (to_toml(CONFIG).replace("vocab_size = 97", "vocab_size = true"), "expected int, got bool"),
    (to_toml(CONFIG).replace('"half"', '"quarter"'), "choose one of"),
    (to_toml(CONFIG).replace("num_heads = 4", "num_heads = 3"), "no multiple of num_kv_heads"),
    (to_toml(CONFIG).replace("head_dim = 8", "head_dim = 7"), "odd"),
    (to_toml(CONFIG).replace("ffn_dim = 48", "ffn_dim = 0"), "ffn_dim = 0"),
    (to_toml(CONFIG).replace("norm_eps = 1e-06", "norm_eps = 0"), "norm_eps"),
    (to_toml(CONFIG).replace("qk_norm = false", "qk_norm = 0"), "expected bool, got int"),
  ],
)
def test_bad_toml_is_refused_by_name(text: str, wanted: str):
  with pytest.raises(ValueError, match=wanted) as caught:
    from_toml(ModelConfig, text, where="here.toml")
  assert "here.toml" in str(caught.value)


def test_spans():
  whole = Span.whole(CONFIG)
  assert len(whole) == 5 and whole.is_first and whole.is_last
  part = Span(first_layer=1, last_layer=3, num_layers=5)
  assert len(part) == 3 and not part.is_first and not part.is_last
  for first, last in ((-1, 2), (3, 2), (0, 5)):
    with pytest.raises(ValueError, match="no range"):
      Span(first_layer=first, last_layer=last, num_layers=5)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("top_k", 0),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("repetition_penalty", 0.0),
    ("presence_penalty", float("inf")),
    ("seed", -1),
    ("seed", 2**64),
  ],
)
def test_bad_sampling_is_refused_by_name(field: str, value: float):
  with pytest.raises(ValueError, match=f"{field} = "):
    Sampling(**{field: value})


def test_architectures_are_found_by_name_and_by_path(tmp_path: Path):
  known = architectures()
  assert {"bonsai-1.7b", "bonsai-8b", "llama-8b", "seed-1024", "tinyllama-1.1b"} <= set(known)
  assert {name: ModelConfig.named(name) for name in known} == {
    path.stem: ModelConfig.load(path)
    for path in (Path(__file__).parents[1] / "configs" / "model").glob("*.toml")
  }
  (tmp_path / "mine.toml").write_text(to_toml(CONFIG))
  assert ModelConfig.named(str(tmp_path / "mine.toml")) == CONFIG
  with pytest.raises(ValueError, match=r"'gpt-9'.*bonsai-8b"):
    ModelConfig.named("gpt-9")

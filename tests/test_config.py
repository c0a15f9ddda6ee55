import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurojax.config import (
  LayerKind,
  ModelConfig,
  RopeScaling,
  Sampling,
  Span,
  architectures,
  from_toml,
  to_toml,
)
from neurojax.plan.fleet import Fleet, Host

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
    ("min_tokens", -1),
    ("min_tokens", 1.5),
    ("seed", -1),
    ("seed", 2**64),
  ],
)
def test_bad_sampling_is_refused_by_name(field: str, value: float):
  with pytest.raises(ValueError, match=f"{field} = "):
    Sampling(**{field: value})


@pytest.mark.parametrize(
  ("bias", "message"),
  [
    (5, "logit_bias = 5: it must be a mapping"),
    ([1, 2], r"logit_bias = \[1, 2\]: it must be a mapping"),
    ({-1: 0.5}, "of token -1: ids are whole numbers"),
    ({1.0: 0.5}, "of token 1.0: ids are whole numbers"),
    ({7: float("nan")}, "of token 7 = nan: it must be a number between -1e6 and 1e6, or -inf"),
    ({7: float("inf")}, "of token 7 = inf"),
    ({7: -1e7}, "of token 7 = -10000000.0"),
    ({7: "1"}, "of token 7 = '1'"),
    ([(3, 1.0), (2, 0.0), (3, 1.0)], "names token 3 twice"),
    (dict.fromkeys(range(513), 1.0), "has 513 tokens: give at most 512"),
  ],
)
def test_bad_biases_are_refused_by_token(bias: object, message: str):
  with pytest.raises(ValueError, match=f"logit_bias.*{message}" if message[0] != "l" else message):
    Sampling(logit_bias=bias)


def test_biases_are_the_same_however_they_are_given():
  given = Sampling(logit_bias={9: -100, 2: 0.5})
  assert given.logit_bias == ((2, 0.5), (9, -100.0))
  assert (
    given == Sampling(logit_bias=[(9, -100.0), (2, 0.5)]) == Sampling(logit_bias=given.logit_bias)
  )
  assert hash(given) == hash(Sampling(logit_bias=iter([(9, -100), (2, 0.5)])))
  assert dataclasses.replace(given, seed=1).logit_bias == given.logit_bias
  assert Sampling(logit_bias={1: -float("inf")}).logit_bias == ((1, -float("inf")),)


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


KINDS = dataclasses.replace(
  CONFIG,
  layer_kinds=(
    LayerKind(sliding_window=8, rope_base=500.0),
    LayerKind(),
    LayerKind(mixer="convolution"),
    LayerKind(
      head_dim=16, num_kv_heads=1, shared_kv=True,
      rope_scaling=RopeScaling(kind="factors", factors=(1.0, 2.0, 3.0, 4.0) * 2),
    ),
  ),
  layer_pattern=(0, 1, 2, 3),
  num_layers=6,
  conv_width=3,
  activation="relu2",
  embedding_scale=2.0,
  num_experts=4,
  experts_per_token=2,
)  # fmt: skip


def test_kinds_of_layers_survive_toml_and_say_what_each_layer_is():
  text = to_toml(KINDS)
  assert from_toml(ModelConfig, text) == KINDS
  assert "qkv_bias" not in text and 'activation = "relu2"' in text
  assert [KINDS.kind_index(layer) for layer in range(6)] == [0, 1, 2, 3, 0, 1]
  assert KINDS.kind(5).head_dim == CONFIG.head_dim and KINDS.kind(4).rope_base == 500.0
  assert (KINDS.sizes(3)["H"], KINDS.sizes(3)["K"], KINDS.sizes()["H"]) == (16, 1, CONFIG.head_dim)
  assert set(KINDS.beyond_plain()) == {
    "layer_kinds", "layer_pattern", "conv_width", "activation", "embedding_scale", "num_experts",
    "experts_per_token",
  }  # fmt: skip
  assert not CONFIG.beyond_plain()


def test_what_the_plain_decoder_lacks_is_marked_on_each_field():
  marked = [f.name for f in dataclasses.fields(ModelConfig) if not f.metadata.get("plain", True)]
  assert marked == [
    "activation", "qkv_bias", "v_norm", "post_norm", "layer_scale", "embedding_scale",
    "attention_scale", "attention_softcap", "logit_softcap", "sliding_window", "rope_scaling",
    "num_experts", "experts_per_token", "conv_width", "layer_kinds", "layer_pattern",
  ]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), [
  ({"activation": "gelu"}, "activation = 'gelu'"),
  ({"sliding_window": 0}, "sliding_window = 0"),
  ({"logit_softcap": -1.0}, "logit_softcap = -1.0"),
  ({"num_experts": 4}, "experts_per_token = 0"),
  ({"num_experts": 2, "experts_per_token": 3}, "experts_per_token = 3 is more than"),
  ({"num_experts": 2, "experts_per_token": 1, "sub_norm": True}, "experts have no norm"),
  ({"conv_width": 3}, "conv_width = 3"),
  ({"layer_kinds": (LayerKind(),)}, "go together"),
  ({"layer_kinds": (LayerKind(),), "layer_pattern": (1,)}, "layer_pattern has 1"),
  ({"layer_kinds": (LayerKind(),) * 2, "layer_pattern": (1,)}, r"layer_kinds\[0\] is not in"),
  ({"layer_kinds": (LayerKind(),), "layer_pattern": (0,) * 9}, "9 entries for num_layers"),
  ({"layer_kinds": (LayerKind(),), "layer_pattern": (0,), "sliding_window": 3}, "each kind"),
  ({"layer_kinds": (LayerKind(num_kv_heads=3),), "layer_pattern": (0,)}, "num_kv_heads = 3"),
  ({"layer_kinds": (LayerKind(mixer="convolution"),), "layer_pattern": (0,)}, "conv_width = 0"),
  ({"rope_scaling": RopeScaling(kind="factors", factors=(1.0,))}, "1 factors for heads of"),
])  # fmt: skip
def test_architectures_that_contradict_themselves_are_refused(changes, message: str):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(("fields", "message"), [
  ({"kind": "dynamic"}, "choose one of linear, llama3"),
  ({"kind": "yarn", "factor": 4.0}, "original_context_length = None"),
  ({"kind": "linear", "beta_fast": 3.0}, "rope scaling 'linear' has no use for it"),
  ({"kind": "linear", "factor": 0.0}, "factor = 0.0"),
  ({"kind": "factors"}, "factors is empty"),
  ({"kind": "factors", "factors": (1.0, -1.0)}, r"factors\[1\] = -1.0"),
  ({"kind": "proportional", "rotated": 1.5}, "rotated = 1.5"),
  ({"kind": "llama3", "original_context_length": 8, "low_freq_factor": 4.0}, "is not below"),
])  # fmt: skip
def test_scalings_that_make_no_sense_are_refused(fields, message: str):
  with pytest.raises(ValueError, match=message):
    RopeScaling(**fields)


def test_a_convolution_has_no_heads():
  with pytest.raises(ValueError, match="leave its other keys out"):
    LayerKind(mixer="convolution", head_dim=8)

"""GGUF files that are written: read back bit by bit, or refused by name."""

import dataclasses
import tracemalloc
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.config import ModelConfig, Span
from neurojax.files.load import load_span
from neurojax.files.open import open_model
from neurojax.files.write import packing
from neurojax.files.write.parameter_source import ParameterSource
from neurojax.measure.random_model import random_model
from neurojax.weights.ternary import TernaryArray
from tests.files import tiny, trained
from tests.tokenizer import vocab

pytestmark = pytest.mark.optimized

CARD = dict(name="tiny", license="Apache-2.0")
PLAIN = ModelConfig(
  vocab_size=40, model_dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=512,
  norm_eps=2.0**-17,
)  # fmt: skip
CONFIGS = {
  "llama": dataclasses.replace(PLAIN, rope_style="interleaved", tied_embedding=False),
  "llama, turned": PLAIN,
  "bitnet": dataclasses.replace(PLAIN, sub_norm=True),
  "qwen3": dataclasses.replace(PLAIN, qk_norm=True, num_heads=8, tied_embedding=False),
  "qwen3, turned": dataclasses.replace(PLAIN, qk_norm=True, rope_style="interleaved"),
}
every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# What each type holds without a change; None is a scale per tensor.
GROUPS = {
  "TQ2_0": (None, 256, 512), "TQ1_0": (None, 256), "Q2_0": (None, 64, 128, 192, 256),
  "Q2_0_g128": (None, 128, 256),
}  # fmt: skip


def check_read_back(path: Path, weights: ParameterSource, kind: str) -> None:
  config = weights.config
  with open_model(path) as file:
    assert file.problems() == []
    turns = file.config.rope_style != config.rope_style
    assert dataclasses.replace(file.config, rope_style=config.rope_style) == config
    for name, layer in weights.places():
      array, values = weights.arrays[name], trained.numbers(weights, name, layer)
      if turns and name in ("q_DNH", "k_DKH", "q_norm_H", "k_norm_H"):
        values = trained.turned(values, config.rope_style)
      np.testing.assert_array_equal(file.read(name, layer), values, err_msg=name)
      if not isinstance(array, TernaryArray) or (turns and name in ("q_DNH", "k_DKH")):
        continue
      codes, scales, group_size = file.read_ternary(name, layer)
      one = array if layer is None else jax_layer(array, layer)
      np.testing.assert_array_equal(codes, one.codes)
      block = packing.TYPES[kind].block
      assert group_size == block and scales.dtype == np.float16
      # Every element has the very bits of its scale.
      k = one.contraction.k
      spread = np.repeat(scales, block, axis=1)[:, :k]
      own = np.asarray(one.scales)
      own = (
        np.broadcast_to(own, spread.shape)
        if one.group_size is None
        else np.repeat(own, one.group_size, axis=1)[:, :k]
      )
      assert spread.tobytes() == np.ascontiguousarray(own).tobytes()


def jax_layer(array: TernaryArray, layer: int) -> TernaryArray:
  return dataclasses.replace(array, codes=array.codes[layer], scales=array.scales[layer])


@every
@pytest.mark.parametrize(("kind", "group_size"), [(k, g) for k in GROUPS for g in GROUPS[k]])
def test_what_is_written_is_read_back_bit_by_bit(
  tmp_path: Path, config: ModelConfig, kind: str, group_size: int | None
):
  if group_size == 192:
    config = dataclasses.replace(config, ffn_dim=448)
  weights = trained.make(config, group_size)
  assert trained.write_gguf(tmp_path / "m.gguf", weights, None, CARD, kind=kind) == kind
  check_read_back(tmp_path / "m.gguf", weights, kind)
  assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@settings(max_examples=20, deadline=None)
@given(
  kind=st.sampled_from(list(GROUPS)),
  heads=st.integers(1, 3),
  group=st.integers(1, 3),
  head_dim=st.sampled_from([2, 6, 64]),
  rows=st.tuples(st.integers(1, 3), st.integers(1, 3)),
  layers=st.integers(1, 3),
  vocab_size=st.integers(9, 40),
  style=st.sampled_from(["half", "interleaved"]),
  norm=st.booleans(),
  tied=st.booleans(),
  packed=st.booleans(),
  seed=st.integers(0, 99),
)
def test_any_shape_comes_back(
  tmp_path_factory, kind, heads, group, head_dim, rows, layers, vocab_size, style, norm, tied,
  packed, seed,
):  # fmt: skip
  codec = packing.TYPES[kind]
  heads *= codec.block // np.gcd(codec.block, head_dim * heads * group)
  config = ModelConfig(
    vocab_size=vocab_size, model_dim=rows[0] * codec.block, num_layers=layers,
    num_heads=int(heads * group), num_kv_heads=int(heads), head_dim=head_dim,
    ffn_dim=rows[1] * codec.block, rope_style=style, qk_norm=norm, tied_embedding=tied,
    norm_eps=2.0**-17,
  )  # fmt: skip
  weights = trained.make(config, codec.block, seed=seed, outer="ternary" if packed else "float32")
  path = tmp_path_factory.mktemp("any") / "m.gguf"
  trained.write_gguf(path, weights, None, CARD, kind=kind)
  check_read_back(path, weights, kind)


@pytest.mark.parametrize(
  ("name", "kind", "group_size", "form"),
  [
    ("llama", "TQ2_0", 256, "w2a16"),
    ("bitnet", "Q2_0", 64, "w2a8"),
    ("bitnet", "TQ2_0", 256, "w2a16"),
    ("qwen3", "Q2_0_g128", 128, "w2a16"),
  ],
)
def test_logits_are_the_very_same_in_the_same_grouping(
  tmp_path: Path, name: str, kind: str, group_size: int, form: str
):
  weights = trained.make(CONFIGS[name], group_size)
  trained.write_gguf(tmp_path / "m.gguf", weights, None, CARD, kind=kind)
  tokens = jnp.arange(24).reshape(2, 12) * 7 % 40
  logits, _ = weights.model(form)(tokens)
  with open_model(tmp_path / "m.gguf") as file:
    again, _ = load_span(file, weights=form)(tokens)
  assert np.abs(logits).max() > 0.1
  np.testing.assert_array_equal(logits, again)


@pytest.mark.parametrize("name", ["llama, turned", "qwen3, turned"])
def test_turned_heads_give_the_same_logits_to_rounding(tmp_path: Path, name: str):
  weights = trained.make(CONFIGS[name], 256)
  trained.write_gguf(tmp_path / "m.gguf", weights, None, CARD)
  tokens = jnp.arange(24).reshape(2, 12) * 7 % 40
  logits, _ = weights.model("w2a16")(tokens)
  with open_model(tmp_path / "m.gguf") as file:
    assert file.config.rope_style != weights.config.rope_style
    again, _ = load_span(file, weights="w2a16")(tokens)
  np.testing.assert_allclose(logits, again, atol=2e-5 * np.abs(logits).max())


@every
@pytest.mark.parametrize("dense", [None, "F16", "BF16", "F32"])
def test_models_that_are_not_ternary_keep_their_dtype_or_are_rounded(
  tmp_path: Path, config: ModelConfig, dense: str | None
):
  config = dataclasses.replace(config, ffn_dim=90)  # no blocks, so any width
  weights = trained.make(config, ternary=False)
  assert trained.write_gguf(tmp_path / "m.gguf", weights, None, CARD, dense=dense) == dense or "F32"
  if dense is None:
    check_read_back(tmp_path / "m.gguf", weights, "")
  with open_model(tmp_path / "m.gguf") as file:
    types = {name: file.info(name, layer).type for name, layer in weights.places()}
    assert {types[name] for name in types if "_norm_" in name} == {"F32"}
    assert types["embedding_VD"] == (dense or "BF16") and types["down_FD"] == (dense or "F32")
    dtype = {"BF16": jnp.bfloat16, "F16": np.float16}.get(dense, np.float32)
    wanted = trained.numbers(weights, "down_FD", 1).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(file.read("down_FD", 1), wanted)


@pytest.mark.parametrize("dense", ["F16", "F32"])
def test_ternary_matrices_as_plain_numbers(tmp_path: Path, dense: str):
  config = dataclasses.replace(PLAIN, ffn_dim=90, sub_norm=True)
  weights = trained.make(config, 64)
  trained.write_gguf(tmp_path / "m.gguf", weights, None, CARD, kind=dense)
  check_read_back(tmp_path / "m.gguf", ParameterSource(config, {
    name: np.stack([trained.numbers(weights, name, layer) for layer in range(2)])
    if isinstance(array, TernaryArray)
    else array
    for name, array in weights.arrays.items()
  }), "")  # fmt: skip
  with pytest.raises(ValueError, match="q_DNH of layer 0: BF16 does not hold"):
    trained.write_gguf(tmp_path / "m.gguf", weights, None, CARD, kind="BF16")


@pytest.mark.parametrize(
  ("config", "group_size", "chosen"),
  [
    (PLAIN, None, "TQ2_0"),
    (PLAIN, 256, "TQ2_0"),
    (PLAIN, 128, "Q2_0"),
    (dataclasses.replace(PLAIN, ffn_dim=320), None, "Q2_0"),
  ],
)
def test_the_type_is_chosen_by_what_holds_the_scales(
  tmp_path: Path, config: ModelConfig, group_size: int | None, chosen: str
):
  weights = trained.make(config, group_size)
  assert trained.write_gguf(tmp_path / "m.gguf", weights, None, CARD) == chosen


def test_what_the_file_says_of_itself_and_the_gguf_package_reads_it(tmp_path: Path):
  spec = vocab.tiny_bpe()
  config = dataclasses.replace(PLAIN, sub_norm=True, vocab_size=300, rope_base=12345.678)
  card = dict(name="a", license="MIT", description="b", author="c", url="https://example.org/d")
  weights = trained.make(config, None)
  trained.write_gguf(tmp_path / "m.gguf", weights, spec, card)
  with open_model(tmp_path / "m.gguf") as file:
    said = {key: file.metadata[key] for key in file.metadata if key.startswith("general.")}
    assert said == {
      "general.architecture": "bitnet", "general.type": "model", "general.name": "a",
      "general.license": "MIT", "general.description": "b", "general.author": "c",
      "general.url": "https://example.org/d", "general.file_type": 37,
      "general.quantization_version": 2,
    }  # fmt: skip
    read = file.tokenizer
    assert read is not None and read.tokens[: len(spec.tokens)] == spec.tokens
    assert read.tokens[263:] == tuple(f"[PAD{i}]" for i in range(263, 300))
    assert read.types[263:] == ("unused",) * 37
    assert (read.merges, read.pre, read.stop_ids) == (spec.merges, spec.pre, spec.stop_ids)
    assert (read.bos_id, read.eos_id, read.add_bos) == (spec.bos_id, spec.eos_id, spec.add_bos)
    assert file.config.rope_base == float(np.float32(12345.678))
    ours = file.read("down_FD", 1)
  reader = gguf.GGUFReader(tmp_path / "m.gguf")
  tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
  np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), ours.T)


def test_a_model_is_written_as_it_is_held(tmp_path: Path):
  model = random_model(PLAIN, Span.whole(PLAIN), weights="w2a16")
  weights = ParameterSource.of(model)
  trained.write_gguf(tmp_path / "m.gguf", weights, None, CARD)
  check_read_back(tmp_path / "m.gguf", weights, "Q2_0")
  part = random_model(PLAIN, Span(first_layer=0, last_layer=0, num_layers=2))
  with pytest.raises(ValueError, match=r"layers 0\.\.0 of 2: a whole one is written"):
    ParameterSource.of(part)


def refusals():
  changed = dataclasses.replace
  yield changed(PLAIN, ffn_dim=320), None, "TQ2_0", r"down_FD: rows of 320 .* choose Q2_0$"
  yield changed(PLAIN, ffn_dim=384), None, "TQ1_0", r"rows of 384 .* choose Q2_0 or Q2_0_g128$"
  yield changed(PLAIN, ffn_dim=90), 64, "Q2_0", r"rows of 90 elements .* choose F16"
  yield changed(PLAIN, ffn_dim=90), 64, None, r"rows of 90 elements .* choose F16"
  yield PLAIN, 64, "TQ2_0", r"groups of 64 .* choose Q2_0, or train with group_size = 256"
  yield PLAIN, 128, "TQ1_0", r"groups of 128 .* choose Q2_0 or Q2_0_g128, or"
  yield PLAIN, 64, "Q2_0_g128", r"groups of 64 elements"
  yield PLAIN, 192, "Q2_0_g128", r"groups of 192 elements"
  yield PLAIN, 64, "Q4_0", r"type 'Q4_0': choose one of TQ2_0, TQ1_0, Q2_0, Q2_0_g128, F32"
  both = changed(PLAIN, sub_norm=True, qk_norm=True)
  yield both, None, None, r"sub_norm and qk_norm: no architecture"
  yield changed(PLAIN, sub_norm=True, tied_embedding=False), None, None, r"tied_embedding = true"
  yield (
    changed(PLAIN, sub_norm=True, head_dim=32),
    None,
    None,
    r"\* head_dim = 128, model_dim = 256",
  )


@pytest.mark.parametrize(("config", "group_size", "kind", "reason"), list(refusals()))
def test_what_no_file_can_hold_is_refused_by_name(tmp_path: Path, config, group_size, kind, reason):
  weights = trained.make(config, group_size)
  (tmp_path / "m.gguf").write_text("of old")
  with pytest.raises(ValueError, match=reason):
    trained.write_gguf(tmp_path / "m.gguf", weights, None, CARD, kind=kind)
  assert [path.read_text() for path in tmp_path.iterdir()] == ["of old"]


def at(array: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
  changed = array.copy()
  changed[place] = value
  return changed


def spoiled(weights: ParameterSource, name: str, **leaves) -> ParameterSource:
  array = weights.arrays[name]
  return ParameterSource(
    weights.config, {**weights.arrays, name: dataclasses.replace(array, **leaves)}
  )


def test_damage_is_found_on_the_way_and_leaves_nothing_behind(tmp_path: Path):
  weights = trained.make(PLAIN, 64)
  up = weights.arrays["up_DF"]
  singles = up.scales.astype(np.float32)
  cases = [
    (spoiled(weights, "up_DF", codes=at(up.codes, (1, 3, 2), 0xFF)),
     "up_DF of layer 1: row 3, element 8: the code 3"),
    (spoiled(weights, "up_DF", scales=at(up.scales, (1, 3, 2), np.nan)),
     "up_DF of layer 1 holds NaN or infinity: take an earlier checkpoint"),
    (spoiled(weights, "up_DF", scales=at(singles, (1, 3, 2), 0.1)),
     "up_DF of layer 1: row 3, group 2: the scale .* is no float16"),
    (spoiled(weights, "up_DF", scales=at(singles, (1, 3, 2), 1e5)), "is no float16"),
  ]  # fmt: skip
  embedding = weights.arrays["embedding_VD"]
  infinite = {**weights.arrays, "embedding_VD": at(embedding, (7, 7), np.inf)}
  cases.append((ParameterSource(PLAIN, infinite), "embedding_VD holds NaN or infinity"))
  for bad, reason in cases:
    with pytest.raises(ValueError, match=reason):
      trained.write_gguf(tmp_path / "m.gguf", bad, None, CARD, kind="Q2_0")
    assert not list(tmp_path.iterdir())
  large = {**weights.arrays, "embedding_VD": at(embedding, (7, 7), 1e6)}
  with pytest.raises(ValueError, match=r"token_embd\.weight: a number is beyond F16"):
    trained.write_gguf(tmp_path / "m.gguf", ParameterSource(PLAIN, large), None, CARD, dense="F16")


def test_arrays_that_are_no_such_model_are_refused():
  arrays = dict(trained.make(PLAIN).arrays)
  head = {**arrays, "head_DV": arrays["embedding_VD"]}
  with pytest.raises(ValueError, match="'head_DV' is no parameter of this model"):
    ParameterSource(PLAIN, head)
  with pytest.raises(ValueError, match=r"up_DF has the shape .* the model wants"):
    ParameterSource(PLAIN, {**arrays, "up_DF": arrays["down_FD"]})
  with pytest.raises(ValueError, match="attn_norm_D is int32"):
    ParameterSource(PLAIN, {**arrays, "attn_norm_D": np.zeros((2, 256), np.int32)})
  del arrays["o_NHD"]
  with pytest.raises(ValueError, match="o_NHD is missing"):
    ParameterSource(PLAIN, arrays)


def test_targets_that_cannot_be_written_are_named(tmp_path: Path):
  weights = trained.make(PLAIN)
  with pytest.raises(ValueError, match="is a folder"):
    trained.write_gguf(tmp_path, weights, None, CARD)
  with pytest.raises(FileNotFoundError, match="no such folder: make it first"):
    trained.write_gguf(tmp_path / "a" / "m.gguf", weights, None, CARD)
  with pytest.raises(ValueError, match="263 tokens and the embedding 40 rows"):
    trained.write_gguf(tmp_path / "m.gguf", weights, vocab.tiny_bpe(), CARD)
  assert not list(tmp_path.iterdir())


def test_a_large_model_is_written_a_tensor_at_a_time(tmp_path: Path):
  one = trained.make(dataclasses.replace(tiny.WIDE, vocab_size=512, ffn_dim=4096), 256)
  config = dataclasses.replace(one.config, num_layers=40)
  places = jax.tree.map(lambda leaf: np.repeat(leaf, 40, axis=0), dict(one.arrays))
  outer = {name: one.arrays[name] for name in ("embedding_VD", "final_norm_D")}
  weights = ParameterSource(config, {**places, **outer})
  largest = max(array.codes[0].nbytes for array in weights.ternary().values())
  total = sum(a.nbytes for a in weights.ternary().values())
  seen = []
  tracemalloc.start()
  trained.write_gguf(
    tmp_path / "m.gguf", weights, None, CARD, progress=lambda *done: seen.append(done)
  )
  peak_bytes = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert seen == [(i + 1, len(seen)) for i in range(40 * 9 + 2)]
  assert peak_bytes < 12 * largest + 1e6 < total / 2

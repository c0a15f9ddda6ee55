"""From a training run to files, by the command line: the same model comes out."""

import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx

from neurojax.cli import main
from neurojax.data.batches import open_dataset
from neurojax.data.token_shards import read_spec
from neurojax.files.load import load_span
from neurojax.files.open import open_model
from neurojax.model.sample import score
from neurojax.tokenizer import Tokenizer
from neurojax.train.step import make_eval_step
from neurojax.train.trained_model import read_run

CONFIG = """
steps = 3
eval_batches = 1
remat = "none"
checkpoint_every = 2
log_every = 3
compute_dtype = "float32"
[model]
vocab_size = 400
model_dim = 64
num_layers = 2
num_heads = 1
num_kv_heads = 1
head_dim = 64
ffn_dim = 192
context_length = 128
sub_norm = true
[quantization]
weights = "ternary"
[optimizer]
peak_lr = 1e-3
[data]
folder = "{data}"
batch_size = 8
seq_len = 32
[layout]
data = 8
"""


def words(seed: int) -> str:
  rng = random.Random(seed)
  known = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "under",
    "river",
    "bank",
    "ran",
    "over",
    "hill",
    "then",
    "never",
    "old",
    "green",
    "with",
  ]
  return " ".join(rng.choice(known) for _ in range(300)) + "."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """data/, text and the run of three steps, in one folder."""
  folder = tmp_path_factory.mktemp("export")
  (folder / "train.txt").write_text(words(0))
  (folder / "text").write_text(words(1))
  assert main([
    "data", "prepare", str(folder / "train.txt"), "--valid", str(folder / "text"),
    "--out", str(folder / "data"), "--vocab-size", "380",
  ]) == 0  # fmt: skip
  (folder / "run.toml").write_text(CONFIG.format(data=folder / "data"))
  arguments = ["--config", str(folder / "run.toml"), "--workdir", str(folder / "run")]
  assert main(["train", *arguments]) == 0
  return folder


def run(capsys, folder: Path, *argv: str) -> tuple[int, str, str]:
  code = main(["export", "--workdir", str(folder / "run"), *argv])
  out, err = capsys.readouterr()
  return code, out, err


def test_the_file_computes_what_training_computed(capsys, folder: Path, tmp_path: Path):
  out_file = tmp_path / "m.gguf"
  code, out, err = run(capsys, folder, "--out", str(out_file), "--license", "MIT")
  assert code == 0, err
  assert f"step 3 of {folder / 'run'}, bitnet, Q2_0," in out
  trained = read_run(folder / "run")
  config = trained.config
  batch = next(iter(open_dataset(config.data, "valid")))
  tokens_BS = jnp.asarray(batch, jnp.int32)
  with open_model(out_file) as file:
    assert file.metadata["general.license"] == "MIT" and file.metadata["general.name"] == "run"
    for name, array in trained.weights.ternary().items():
      for layer in range(2):
        codes, scales, _ = file.read_ternary(name, layer)
        np.testing.assert_array_equal(codes, array.codes[layer])
        assert (scales == array.scales[layer]).all() and scales.dtype == np.float16
    logits_BTV, _ = load_span(file)(tokens_BS[:, :-1])
  nats = -score(logits_BTV, tokens_BS[:, 1:]).sum()
  wanted, count = trained_nats(folder, tokens_BS)
  assert count == tokens_BS[:, 1:].size
  assert float(nats) == pytest.approx(wanted, rel=2e-6)


def trained_nats(folder: Path, tokens_BS) -> tuple[float, float]:
  """By the program that trained, from the checkpoint's own state."""
  from neurojax.train.checkpoint import Checkpoints
  from neurojax.train.step import abstract_state

  config = read_run(folder / "run").config
  mesh = config.layout.mesh(jax.devices()[:1])
  checkpoints = Checkpoints(folder / "run" / "checkpoints", keep=2)
  state, _ = checkpoints.restore(3, abstract_state(config, mesh))
  checkpoints.close()
  nats, count = make_eval_step(config, mesh)(state.params, tokens_BS)
  return float(nats), float(count)


def test_perplexity_is_the_same_before_and_after_and_in_two_stages(
  capsys, folder: Path, tmp_path: Path
):
  path, text = str(tmp_path / "m.gguf"), str(folder / "text")
  code, out, err = run(
    capsys, folder, "--out", path, "--text", text, "--ctx", "64", "--chunks", "2"
  )
  assert code == 0, err
  before, after = (float(part.split()[0]) for part in out.split("62 tokens: ")[1].split(", "))
  assert before == after > 1
  assert main([
    "eval", "ppl", "--model", path, "--text", text, "--ctx", "64", "--chunks", "2", "--json",
    "--stages", "2",
  ]) == 0  # fmt: skip
  cut = json.loads(capsys.readouterr().out)
  assert cut["tokens"] == 62 and cut["perplexity"] == pytest.approx(after, rel=1e-6)


def test_an_earlier_step_and_a_folder_for_transformers(capsys, folder: Path, tmp_path: Path):
  code, out, _ = run(capsys, folder, "--out", str(tmp_path / "hf"), "--step", "2")
  assert code == 0 and "step 2 of" in out and "BitNetForCausalLM, float32" in out
  early, late = (read_run(folder / "run", step).weights for step in (2, None))
  with safetensors.safe_open(tmp_path / "hf" / "model.safetensors", framework="numpy") as file:
    found = file.get_tensor("model.norm.weight")
  np.testing.assert_array_equal(found, early.arrays["final_norm_D"])
  assert (early.arrays["final_norm_D"] != late.arrays["final_norm_D"]).any()
  code, _, _ = run(capsys, folder, "--out", str(tmp_path / "hf"), "--overwrite")
  assert code == 0
  (tmp_path / "hf" / "notes").write_text("mine")
  code, _, err = run(capsys, folder, "--out", str(tmp_path / "hf"), "--overwrite")
  assert code == 2 and "notes is of no export" in err
  assert (tmp_path / "hf" / "notes").exists()


def test_the_weights_as_a_model_without_a_file(folder: Path):
  weights = read_run(folder / "run").weights
  pure = nnx.to_pure_dict(nnx.state(weights.model()))
  array = weights.arrays["o_NHD"]
  found = pure["layers"]["attention"]["o_NHD"]
  assert found.shape == (2, 1, 64, 64) and found.dtype == jnp.float32
  assert set(np.unique(np.abs(found[1]))) <= {0, np.float32(array.scales[1, 0, 0])}


@pytest.mark.parametrize(
  ("argv", "reason"),
  [
    (["--out", "m.gguf", "--type", "TQ2_0"], "q_DNH: rows of 64 elements are no whole TQ2_0"),
    (["--out", "m.gguf", "--step", "1"], "has checkpoints of 2, 3"),
    (["--out", "m.gguf", "--dtype", "float32"], "--dtype float32 is for a folder"),
    (["--out", "m", "--type", "Q2_0"], "--type is for GGUF"),
    (["--out", "m", "--text", "text"], "--text is for GGUF"),
    (["--out", "m", "--dtype", "bfloat16"], "is not exact in bfloat16: choose float32"),
    (["--out", "m.safetensors"], "name a folder, or a file that ends in .gguf"),
    (["--out", "there.gguf"], "there.gguf exists: name another file, or give --overwrite"),
    (["--out", "none/m.gguf"], "none: no such folder"),
    (["--out", "m.gguf", "--workdir", "none"], "--workdir none: no such folder"),
    (["--out", "m.gguf", "--workdir", "."], "no run of `neurojax train`"),
    (["--out", "m.gguf", "--tokenizer", "there.gguf"], "there.gguf: this model file is empty"),
  ],
)
def test_what_cannot_be_exported_is_said(
  capsys, folder: Path, tmp_path: Path, monkeypatch, argv: list[str], reason: str
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "there.gguf").touch()
  code, out, err = run(capsys, folder, *argv)
  assert (code, out) == (2, "") and reason in err
  assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


@pytest.mark.parametrize("vocab", ["spm", "unigram"])
def test_sentencepiece_vocabularies_keep_their_ids(
  capsys, folder: Path, tmp_path: Path, vocab: str
):
  """Both go into a folder, and SentencePiece's BPE into GGUF; a unigram model is refused by name."""
  data, out, gguf = tmp_path / "data", tmp_path / "folder", tmp_path / "m.gguf"
  assert main([
    "data", "prepare", str(folder / "train.txt"), "--valid", str(folder / "text"),
    "--out", str(data), "--vocab", vocab, "--vocab-size", "290",
  ]) == 0  # fmt: skip
  # The run's embedding has more rows than the vocabulary has tokens.
  code, _, err = run(capsys, folder, "--out", str(out), "--tokenizer", str(data))
  assert code == 0, err
  code, _, err = run(capsys, folder, "--out", str(gguf), "--tokenizer", str(data))
  if vocab == "unigram":
    assert code == 2 and "SentencePiece unigram model" in err and "write a folder" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "folder"]
  else:
    assert code == 0, err
  for model in [data / "tokenizer.model", out, gguf][: 2 if vocab == "unigram" else 3]:
    assert main(["tokenize", "--model", str(model), "--file", str(folder / "text"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == Tokenizer(read_spec(data)).encode((folder / "text").read_text()), model

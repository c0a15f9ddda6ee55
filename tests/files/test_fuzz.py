"""Thousands of damaged files, by a fixed seed: an error that names its file, or a file that loads."""

import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neurojax.config import ModelConfig
from neurojax.files import inspect, names
from neurojax.files.open import open_model
from neurojax.tokenizer import Tokenizer
from tests.files import trained
from tests.tokenizer import vocab

CONFIG = ModelConfig(
  vocab_size=280, model_dim=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, ffn_dim=64,
  qk_norm=True, tied_embedding=False,
)  # fmt: skip
NUMBERS = (
  0, 1, 2, 3, 7, 31, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**62,
  2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1,
)  # fmt: skip
WORDS = (
  b"", b"\xff\xfe", b"gpt2", b"llama", b"none", b"gemma3", b"lfm2", b"default", b"x" * 300,
  "\u2581\u2581".encode(), b"{{ 1 }}", b"{%", b"general.architecture", b"tokenizer.ggml.tokens",
)  # fmt: skip


def use(path: Path) -> str | None:
  """Everything that a program does with a file; the error that it got, if any."""
  spec = None
  try:
    with open_model(path) as model:
      inspect.describe(model)
      model.check()
      layers = range(model.config.num_layers)
      for name in model.interpretation.tensors:
        for layer in layers if name in names.PER_LAYER else (None,):
          model.read(name, layer)
          model.narrow_form(name, layer)
      spec = model.tokenizer
  except (ValueError, NotImplementedError) as error:
    return str(error)
  if spec is not None:
    try:
      tokenizer = Tokenizer(spec)
      tokenizer.decode(tokenizer.encode("the caf\u00e9 <s> 12", add_special=True))
    except (ValueError, NotImplementedError) as error:
      return f"{path}: {error}"
  return None


def damaged(data: bytes, end: int, rng: random.Random) -> bytes:
  """One to three mutations of the first `end` bytes."""
  changed = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    at = rng.randrange(min(end, len(changed)) or 1)
    match rng.randrange(9):
      case 0:
        changed[at : at + 1] = bytes([rng.randrange(256)])
      case 1:
        changed[at : at + 1] = bytes([changed[at] ^ 1 << rng.randrange(8)]) if changed else b""
      case 2:
        changed[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
      case 3:
        changed[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
      case 4:
        del changed[at : at + rng.choice((1, 4, 8, 40))]
      case 5:
        piece = changed[at : at + rng.choice((1, 8, 60))]
        changed[at:at] = piece
      case 6:
        other = rng.randrange(min(end, len(changed)) or 1)
        changed[at : at + 8], changed[other : other + 8] = (
          changed[other : other + 8], changed[at : at + 8],
        )  # fmt: skip
      case 7:
        word = rng.choice(WORDS)
        changed[at : at + len(word) + 8] = struct.pack("<Q", len(word)) + word
      case 8:
        del changed[at if rng.random() < 0.5 else rng.randrange(len(changed) or 1) :]
  return bytes(changed)


@pytest.fixture(scope="module", params=["bpe", "spm"])
def gguf_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
  spec = vocab.tiny_bpe if request.param == "bpe" else vocab.tiny_spm
  template = "{% for m in messages %}{{ m.content }}{% endfor %}"
  path = tmp_path_factory.mktemp("fuzz") / f"{request.param}.gguf"
  weights = trained.make(CONFIG, 64)
  trained.write_gguf(path, weights, spec(chat_template=template, add_eos=False), dict(name="m"))
  return path


def test_damaged_gguf_files(gguf_file: Path, tmp_path: Path):
  data = gguf_file.read_bytes()
  with open_model(gguf_file) as model:
    end = min(info.offset for info in model.tensors.values())
  assert use(gguf_file) is None
  rng = random.Random(f"gguf {gguf_file.stem}")
  path, loaded = tmp_path / "damaged.gguf", 0
  for _ in range(1200):
    path.write_bytes(damaged(data, end, rng))
    error = use(path)
    assert error is None or str(path) in error
    loaded += error is None
  # Most bytes are those of tokens: some damage is another vocabulary, and no damage to the file.
  assert 0 < loaded < 1000


def texts(value: object) -> Iterator[tuple[object, object]]:
  """Every place of a JSON value: (container, key)."""
  items = value.items() if isinstance(value, dict) else enumerate(value)  # type: ignore[arg-type]
  for key, inner in list(items):
    yield value, key
    if isinstance(inner, dict | list):
      yield from texts(inner)


VALUES: tuple[Callable[[object], object], ...] = (
  lambda _: None,
  lambda _: -1,
  lambda _: 2**63,
  lambda _: 10**400,
  lambda _: 0.5,
  lambda _: True,
  lambda _: "",
  lambda _: "F32",
  lambda _: "../../etc/passwd",
  lambda _: [],
  lambda _: {},
  lambda _: [1] * 9,
  lambda v: [v],
  lambda v: {"x": v},
  lambda v: v + 1 if isinstance(v, int) else v,
  lambda v: v * 2 if isinstance(v, int | str | list) and not isinstance(v, bool) else v,
)


def damaged_json(text: str, rng: random.Random) -> bytes:
  if rng.random() < 0.3:
    return damaged(text.encode(), len(text), rng)
  value = json.loads(text)
  for _ in range(rng.choice((1, 1, 2))):
    places = list(texts(value))
    if not places:
      break
    container, key = rng.choice(places)
    if rng.random() < 0.2:
      del container[key]  # type: ignore[attr-defined]
    else:
      container[key] = rng.choice(VALUES)(container[key])  # type: ignore[index]
  return json.dumps(value).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder of two shards: the tensors of the layers in the second one."""
  path = tmp_path_factory.mktemp("fuzz") / "folder"
  trained.write_folder(path, trained.make(CONFIG, 64), vocab.tiny_bpe())
  whole = path / "model.safetensors"
  table, data = split(whole.read_bytes())
  table.pop("__metadata__")
  shards: dict[str, str] = {}
  for number, part in enumerate(("model.layers.", "")):
    name = f"model-0000{number + 1}-of-00002.safetensors"
    mine = {n: e for n, e in table.items() if n.startswith("model.layers.") == bool(part)}
    body, entries = b"", {}
    for tensor, entry in mine.items():
      first, last = entry["data_offsets"]
      entries[tensor] = entry | {"data_offsets": [len(body), len(body) + last - first]}
      body += data[first:last]
      shards[tensor] = name
    (path / name).write_bytes(joined(entries, body))
  whole.unlink()
  index = {"metadata": {"total_size": len(data)}, "weight_map": shards}
  (path / "model.safetensors.index.json").write_text(json.dumps(index))
  return path


def split(raw: bytes) -> tuple[dict, bytes]:
  nbytes = int.from_bytes(raw[:8], "little")
  return json.loads(raw[8 : 8 + nbytes]), raw[8 + nbytes :]


def joined(table: dict | bytes, body: bytes) -> bytes:
  text = table if isinstance(table, bytes) else json.dumps(table).encode()
  return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("config.json", 300),
    ("model.safetensors.index.json", 150),
    ("model-00002-of-00002.safetensors", 300),
    ("tokenizer.json", 150),
    ("tokenizer_config.json", 60),
  ],
)
def test_damaged_folders(folder: Path, tmp_path: Path, name: str, count: int):
  assert use(folder) is None
  for file in folder.iterdir():
    (tmp_path / file.name).hardlink_to(file)
  rng, raw, seen = random.Random(name), (folder / name).read_bytes(), set()
  for _ in range(count):
    (tmp_path / name).unlink()
    if name.endswith(".json"):
      changed = damaged_json(raw.decode(), rng)
    else:
      table, body = split(raw)
      changed = (
        damaged(raw, len(raw) - len(body), rng)
        if rng.random() < 0.5
        else joined(damaged_json(json.dumps(table), rng), body)
      )
    (tmp_path / name).write_bytes(changed)
    error = use(tmp_path)
    assert error is None or str(tmp_path) in error
    seen.add(error is None)
  assert False in seen


# What would take memory, time or the stack if it were believed; each opened under a limit.
WORST = """
import resource, struct, sys, time
from pathlib import Path
from neurojax.files import inspect
from neurojax.files.open import open_model
from tests.files import tiny
from tests.files.test_fuzz import use

folder = Path(sys.argv[1])
q, i = struct.Struct("<Q").pack, struct.Struct("<I").pack
deep = i(9) + q(1)
safe = lambda text: len(text).to_bytes(8, "little") + text
files = {
  "many tensors": tiny.header(num_tensors=2**63),
  "many keys": tiny.header(num_keys=2**40) + bytes(4096),
  "a long key": tiny.header([q(2**62) + b"k" * 64]),
  "a long string": tiny.header([tiny.text("k") + i(8) + q(2**63) + b"v" * 64]),
  "a long array": tiny.header([tiny.key("k", 9, tiny.array(4, 2**61))]),
  "many strings": tiny.header([tiny.key("tokenizer.ggml.tokens", 9, tiny.array(8, 2**60))]),
  "long strings": tiny.header([tiny.key("k", 9, tiny.array(8, 3, q(2**64 - 8) * 3))]),
  "deep arrays": tiny.header([tiny.key("k", 9, deep * 200_000 + tiny.array(4, 0))]),
  "empty arrays": tiny.header([tiny.key("k", 9, tiny.array(9, 2**20, tiny.array(0, 0) * 2**20))]),
  "a large tensor": tiny.header(tensors=[tiny.tensor("t", (2**40, 2**20), 0, 0)]),
  "many layers": tiny.header([
    tiny.key("general.architecture", 8, tiny.text("llama")),
    *(tiny.key(f"llama.{k}", 4, i(2**32 - 1)) for k in (
      "block_count", "embedding_length", "attention.head_count", "feed_forward_length",
      "context_length", "attention.head_count_kv")),
  ]),
  "4 MB of zeros": bytes(4 << 20),
  "a long safetensors header": q(2**62) + b"{" + bytes(64),
  "deep JSON": safe(b"[" * 4_000_000),
  "deep objects": safe(b'{"a":' * 1_000_000),
  "a long number": safe(b'{"a":' + b"9" * 4_000_000 + b"}"),
}
for name, data in files.items():
  (folder / name).write_bytes(data)
use(folder / "many tensors")  # whatever is imported late
status = Path("/proc/self/status").read_text()
now = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (now + (256 << 20), now + (256 << 20)))
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
for name in files:
  error = use(folder / name)
  assert error is not None and str(folder / name) in error, (name, error)
  folder_of = folder / ("folder " + name)
  folder_of.mkdir()
  (folder_of / "config.json").write_bytes(files[name])
  error = use(folder_of)
  assert error is not None and str(folder_of) in error, (name, error)
print(len(files))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
def test_the_worst_kinds_fit_into_256_mib(tmp_path: Path):
  done = subprocess.run(
    [sys.executable, "-c", WORST, str(tmp_path)], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.strip() == "16"

"""Models from a hub: what is asked for, what comes, what is kept when it breaks, and what is refused."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from neurojax.files.hub import cache, download
from neurojax.files.hub.address import ALIASES, Address, check_file_name
from neurojax.files.hub.choice import choose
from neurojax.files.hub.download import Pull
from neurojax.files.hub.remote import Hub
from tests.files.hub_server import COMMIT, Repository, Server, git_sha1, serving, sha256

WEIGHTS = bytes(range(256)) * 40
OTHER = WEIGHTS[::-1]
SMALL = b'{"model_type": "llama"}'
INDEX = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
  monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
  monkeypatch.delenv("HF_TOKEN", raising=False)
  monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
  # Waiting before another try.
  monkeypatch.setattr(time, "sleep", lambda _: None)
  monkeypatch.setenv("NEUROJAX_CACHE_DIR", str(tmp_path / "digests"))
  with serving() as server:
    server.repositories["org/tiny"] = Repository(
      {"README.md": b"a card", "tiny-Q8_0.gguf": WEIGHTS}
    )
    yield server


def pull(hub: Server, text: str, folder: Path, **options) -> download.Pulled:
  address = Address.parse(text)
  assert address is not None
  return Pull(Hub(hub.url), address, folder).run(**options)


def find(text: str, folder: Path) -> Path:
  address = Address.parse(text)
  assert address is not None
  return cache.find(address, folder)


def test_a_model_comes_once_and_lies_where_other_tools_look(hub: Server, tmp_path: Path):
  seen = []
  done = pull(hub, "org/tiny", tmp_path, progress=lambda name, here: seen.append((name, here)))
  assert done.path.read_bytes() == WEIGHTS and done.came_bytes == len(WEIGHTS)
  assert seen[-1] == ("tiny-Q8_0.gguf", len(WEIGHTS))
  assert [file.sha256 for file, _ in done.files] == [sha256(WEIGHTS)]
  # The card was not wanted.
  assert [one.path for one in hub.bodies()] == [
    f"/org/tiny/resolve/{COMMIT}/tiny-Q8_0.gguf", f"/delivery/{sha256(WEIGHTS)}"
  ]  # fmt: skip
  found = huggingface_hub.try_to_load_from_cache("org/tiny", "tiny-Q8_0.gguf", cache_dir=tmp_path)
  assert Path(str(found)) == done.path == find("org/tiny", tmp_path)
  assert huggingface_hub.hf_hub_download(
    "org/tiny", "tiny-Q8_0.gguf", cache_dir=tmp_path, local_files_only=True
  ) == str(done.path)
  again = pull(hub, "org/tiny", tmp_path, verify=True)
  assert again.came_bytes == 0 and len(hub.bodies()) == 2


def test_what_another_tool_downloaded_is_used(hub: Server, tmp_path: Path):
  path = huggingface_hub.hf_hub_download(
    "org/tiny", "tiny-Q8_0.gguf", cache_dir=tmp_path, endpoint=hub.url
  )
  assert find("org/tiny", tmp_path) == Path(path)
  assert pull(hub, "org/tiny", tmp_path).came_bytes == 0


def test_a_broken_connection_is_gone_on_with(hub: Server, tmp_path: Path):
  hub.cuts = [3000, 2000, 1000]
  done = pull(hub, "org/tiny", tmp_path)
  assert done.path.read_bytes() == WEIGHTS and done.came_bytes == len(WEIGHTS)
  ranges = [one.range for one in hub.bodies() if "delivery" in one.path]
  assert ranges == [None, "bytes=3000-", "bytes=5000-", "bytes=6000-"]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_later_pull_goes_on_where_an_earlier_one_ended(
  hub: Server, tmp_path: Path, knows_ranges: bool
):
  hub.cuts = [3000] + [0] * 20
  with pytest.raises(ConnectionError, match="what came is kept"):
    pull(hub, "org/tiny", tmp_path)
  with pytest.raises(FileNotFoundError, match="neurojax pull org/tiny"):
    find("org/tiny", tmp_path)
  hub.cuts, hub.asked, hub.knows_ranges = [], [], knows_ranges
  done = pull(hub, "org/tiny", tmp_path)
  assert done.path.read_bytes() == WEIGHTS
  assert done.came_bytes == len(WEIGHTS) - 3000 * knows_ranges
  assert hub.bodies()[-1].range == "bytes=3000-"
  assert [path.name for path in (done.path.parents[2] / "blobs").iterdir()] == [sha256(WEIGHTS)]


@pytest.mark.parametrize(
  ("file", "came"),
  [
    ("tiny-Q8_0.gguf", OTHER), ("tiny-Q8_0.gguf", WEIGHTS + b"more"), ("README.md", b"A card"),
  ],
)  # fmt: skip
def test_other_bytes_than_listed_are_refused_and_removed(
  hub: Server, tmp_path: Path, file: str, came: bytes
):
  hub.send = {file: came}
  with pytest.raises(ValueError, match=f"{file}.*(removed|nothing of it was kept)"):
    pull(hub, f"org/tiny:{file}", tmp_path)
  assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
  hub.send = {}
  assert pull(hub, f"org/tiny:{file}", tmp_path).came_bytes > 0


def test_too_few_bytes_are_no_file(hub: Server, tmp_path: Path):
  hub.send = {"tiny-Q8_0.gguf": WEIGHTS[:-1]}
  with pytest.raises(ConnectionError, match="ended early"):
    pull(hub, "org/tiny", tmp_path)
  assert not list(tmp_path.glob("*/snapshots/*/*"))


def test_a_file_that_was_changed_is_noticed_on_use_and_pulled_anew(hub: Server, tmp_path: Path):
  path = pull(hub, "org/tiny", tmp_path).path
  assert find("org/tiny", tmp_path) == path
  with path.open("r+b") as file:
    file.write(b"!")
  os.utime(path, (1, 1))
  with pytest.raises(ValueError, match="was changed since"):
    find("org/tiny", tmp_path)
  with pytest.raises(ValueError, match="removed, pull again"):
    pull(hub, "org/tiny", tmp_path, verify=True)
  assert pull(hub, "org/tiny", tmp_path).path.read_bytes() == WEIGHTS
  assert find("org/tiny", tmp_path) == path


def test_a_shortened_file_is_noticed_by_a_pull(hub: Server, tmp_path: Path):
  path = pull(hub, "org/tiny", tmp_path).path
  os.truncate(path, 100)
  with pytest.raises(ValueError, match="100 bytes of 10,240"):
    pull(hub, "org/tiny", tmp_path)


def test_the_token_opens_and_stays_with_the_hub(
  hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  hub.repositories["org/tiny"].is_gated = True
  with pytest.raises(PermissionError, match=rf"wants a token.*{hub.url}/org/tiny.*HF_TOKEN"):
    pull(hub, "org/tiny", tmp_path)
  monkeypatch.setenv("HF_TOKEN", "hf_other")
  with pytest.raises(PermissionError, match="the token given has no access"):
    pull(hub, "org/tiny", tmp_path)
  monkeypatch.setenv("HF_TOKEN", "expired")
  with pytest.raises(PermissionError, match="does not take the token"):
    pull(hub, "org/tiny", tmp_path)
  monkeypatch.setenv("HF_TOKEN", hub.token)
  hub.asked = []
  assert pull(hub, "org/tiny", tmp_path).path.read_bytes() == WEIGHTS
  assert {(one.path.split("/")[1], one.token) for one in hub.asked} == {
    ("api", hub.token), ("org", hub.token), ("delivery", None)
  }  # fmt: skip


def test_what_is_not_there_is_said(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  with pytest.raises(FileNotFoundError, match=r"org/none: no such model .*without a token"):
    pull(hub, "org/none", tmp_path)
  with pytest.raises(FileNotFoundError, match="no revision 'v2'"):
    pull(hub, "org/tiny@v2", tmp_path)
  with pytest.raises(ValueError, match=r"no file 'Q4_K_M'(.|\n)*tiny-Q8_0.gguf  10.2 kB"):
    pull(hub, "org/tiny:Q4_K_M", tmp_path)
  del hub.repositories["org/tiny"].files["tiny-Q8_0.gguf"]
  with pytest.raises(ValueError, match=r"no model that is read here(.|\n)*README.md"):
    pull(hub, "org/tiny", tmp_path)
  hub.answers = [500]
  with pytest.raises(ConnectionError, match="answered 500"):
    pull(hub, "org/tiny", tmp_path)
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
    pull(hub, "org/tiny", tmp_path)


def test_too_little_room_is_said_before_anything_comes(
  hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  usage = shutil._ntuple_diskusage(10**9, 10**9 - 9999, 9999)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  with pytest.raises(ValueError, match=r"10.2 kB are to come.*10 kB free.*HF_HOME"):
    pull(hub, "org/tiny", tmp_path)
  assert hub.bodies() == []


def test_a_file_beyond_plain_http_names_the_way(
  hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(download, "MOST_BYTES", 9000)
  with pytest.raises(NotImplementedError, match=r"hf download org/tiny tiny-Q8_0.gguf"):
    pull(hub, "org/tiny", tmp_path)


@pytest.mark.parametrize(
  "answer",
  [
    b"<html>", b"[]", b"{}", b'{"id": "org/tiny"}', b'{"id": "org/tiny", "sha": "../../x"}',
    *(
      json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": [entry]}).encode()
      for entry in (
        {}, {"rfilename": 3, "size": 1, "blobId": "0" * 40},
        {"rfilename": "a.gguf"}, {"rfilename": "a.gguf", "size": -1, "blobId": "0" * 40},
        {"rfilename": "a.gguf", "size": 1, "blobId": "../../../evil"},
        {"rfilename": "a.gguf", "size": 1, "lfs": {"sha256": "/x", "size": 1, "pointerSize": 1}},
        {"rfilename": "a.gguf", "size": 1, "lfs": {"sha256": "0" * 64}},
        *(
          {"rfilename": name, "size": 1, "blobId": "0" * 40}
          for name in ("../a.gguf", "/etc/a.gguf", "a/../../b.gguf", "a//b.gguf", "./a.gguf", "a\\b.gguf", "\x1b[2J.gguf")
        ),
      )
    ),
  ],
)  # fmt: skip
def test_what_no_hub_would_answer_is_refused(hub: Server, tmp_path: Path, answer: bytes):
  hub.answers = [answer]
  with pytest.raises(ValueError, match=r"is HF_ENDPOINT right|not taken"):
    pull(hub, "org/tiny", tmp_path)
  assert hub.bodies() == [] and not list(tmp_path.glob("models--*"))


def test_a_folder_of_safetensors_comes_whole_and_without_code(hub: Server, tmp_path: Path):
  parts = {INDEX["a"]: WEIGHTS, INDEX["b"]: OTHER}
  index = json.dumps({"metadata": {}, "weight_map": INDEX}).encode()
  wanted = {
    "config.json": SMALL, "tokenizer.json": b'{"a": 1}' * 500, "model.safetensors.index.json": index, **parts,
  }  # fmt: skip
  others = {
    "modeling.py": b"import os", "pytorch_model.bin": WEIGHTS, "consolidated.safetensors": WEIGHTS,
    "README.md": b"a card", "original/model.safetensors": OTHER,
  }  # fmt: skip
  hub.repositories["org/folder"] = Repository(wanted | others)
  done = pull(hub, "org/folder", tmp_path)
  assert {path.name: path.read_bytes() for path in done.path.iterdir()} == wanted
  assert find("org/folder", tmp_path) == done.path
  assert find("org/folder:safetensors", tmp_path) == done.path
  # A part of the weights is missing: it is not used as if it were whole.
  (done.path / INDEX["b"]).unlink()
  with pytest.raises(FileNotFoundError, match=rf"{INDEX['b']}"):
    find("org/folder", tmp_path)
  assert pull(hub, "org/folder", tmp_path).came_bytes == 0
  assert find("org/folder", tmp_path) == done.path


def test_an_index_cannot_name_what_is_not_listed(hub: Server, tmp_path: Path):
  index = json.dumps({"weight_map": {"a": "../../evil.safetensors"}}).encode()
  files = {"config.json": SMALL, "model.safetensors.index.json": index}
  hub.repositories["org/folder"] = Repository(files)
  with pytest.raises(ValueError, match="names files that are not there"):
    pull(hub, "org/folder", tmp_path)


def test_revisions_are_kept_apart(hub: Server, tmp_path: Path):
  old = "ba5e" + "0" * 36
  pull(hub, "org/tiny", tmp_path)
  hub.repositories["org/tiny"] = Repository(
    {"new.gguf": OTHER}, commit=old, branches=("main", "v1")
  )
  assert pull(hub, "org/tiny@v1", tmp_path).path.name == "new.gguf"
  assert find("org/tiny", tmp_path).name == "tiny-Q8_0.gguf"
  assert find(f"org/tiny@{old}", tmp_path) == find("org/tiny@v1", tmp_path)
  pull(hub, "org/tiny", tmp_path)
  assert find("org/tiny", tmp_path).name == "new.gguf"


GGUF = {
  "a-Q4_K_M.gguf": 1, "a-Q4_K_S.gguf": 2, "a-UD-Q8_0-00001-of-00002.gguf": 3, "a-UD-Q8_0-00002-of-00002.gguf": 4,
  "a-Q2_0.gguf": 5, "a-Q2_0_g64.gguf": 6, "mmproj-a-F16.gguf": 7, "BF16/a-BF16.gguf": 8, "run.py": 9,
}  # fmt: skip


@pytest.mark.parametrize(
  ("wanted", "files"),
  [
    ("Q4_K_M", ["a-Q4_K_M.gguf"]), ("q4_k_s", ["a-Q4_K_S.gguf"]), ("Q2_0", ["a-Q2_0.gguf"]),
    ("Q2_0_g64", ["a-Q2_0_g64.gguf"]), ("bf16", ["BF16/a-BF16.gguf"]),
    ("mmproj-a-F16.gguf", ["mmproj-a-F16.gguf"]),
    *((name, ["a-UD-Q8_0-00001-of-00002.gguf", "a-UD-Q8_0-00002-of-00002.gguf"])
      for name in ("Q8_0", "a-UD-Q8_0-00001-of-00002.gguf", "a-UD-Q8_0-00002-of-00002.gguf")),
  ],
)  # fmt: skip
def test_a_gguf_model_is_chosen_by_quantization_or_name(wanted: str, files: list[str]):
  choice = choose("org/a", GGUF, wanted)
  assert list(choice.files) == files and choice.opens == files[0]


def test_choosing_asks_where_it_would_have_to_guess():
  with pytest.raises(
    ValueError, match=r"several models(.|\n)*a-Q4_K_M.gguf(.|\n)*  7 bytes"
  ) as caught:
    choose("org/a", GGUF | {"a-UD-Q8_0-00002-of-00002.gguf": 4}, None)
  assert "mmproj" not in str(caught.value)
  both = {"config.json": 1, "model.safetensors": 2, "a.gguf": 3}
  with pytest.raises(ValueError, match=r"several(.|\n)*a.gguf(.|\n)*safetensors"):
    choose("org/a", both, None)
  assert choose("org/a", both, "safetensors").files == ("config.json", "model.safetensors")
  assert choose("org/a", both, "model.safetensors").opens == ""
  with pytest.raises(ValueError, match=r"has 00003 parts, of which 1 are there; missing: 1, 3"):
    choose("org/a", {"a-00002-of-00003.gguf": 1}, None)
  for pickle in ("pytorch_model.bin", "model.pt", "code.py"):
    with pytest.raises(NotImplementedError, match="run code"):
      choose("org/a", {"config.json": 1, pickle: 2}, pickle)
  with pytest.raises(NotImplementedError, match="only weights that can run code"):
    choose("org/a", {"config.json": 1, "pytorch_model.bin": 2}, None)
  # A llama2.c checkpoint is no pickle.
  assert choose("org/a", {"stories15M.bin": 1}, "stories15M.bin").opens == "stories15M.bin"


@pytest.mark.parametrize(
  ("text", "repo", "revision", "file"),
  [
    ("org/name", "org/name", "main", None), ("org/name:Q4_K_M", "org/name", "main", "Q4_K_M"),
    ("org/name@v1:a/b.gguf", "org/name", "v1", "a/b.gguf"), ("org/a.b-c_d@refs/pr/1", "org/a.b-c_d", "refs/pr/1", None),
    ("hf.co/org/name:Q8_0", "org/name", "main", "Q8_0"), ("hf://org/name.gguf", "org/name.gguf", "main", None),
    ("https://huggingface.co/org/name", "org/name", "main", None),
    ("https://huggingface.co/org/name/blob/main/a.gguf", "org/name", "main", "a.gguf"),
    ("https://huggingface.co/org/name/resolve/v1/a/b.gguf?download=true", "org/name", "v1", "a/b.gguf"),
    ("llama7b", "meta-llama/Llama-2-7b-hf", "main", None), ("Bonsai-8B:F16", "prism-ml/Ternary-Bonsai-8B-gguf", "main", "F16"),
    ("bonsai_8b", "prism-ml/Ternary-Bonsai-8B-gguf", "main", "Q2_0"),
  ],
)  # fmt: skip
def test_addresses(text: str, repo: str, revision: str, file: str | None):
  address = Address.parse(text)
  assert address == Address(repo, revision, file)
  assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
  "text", ["model.gguf", "models/model.gguf", "/a/b", "./a/b", "../a/b", "a/b/c", "org/", "", "~/m", "a b/c"]
)  # fmt: skip
def test_paths_are_no_addresses(text: str):
  assert Address.parse(text) is None


@pytest.mark.parametrize(
  "text", ["org/name@../x", "org/name@a/../b", "org/na..me", "org/name:../x", "org/name:/etc/passwd", "org/na--me"]
)  # fmt: skip
def test_addresses_that_would_lead_elsewhere_are_refused(text: str):
  with pytest.raises(ValueError, match=r"no revision|no name|not taken"):
    Address.parse(text)


def test_aliases_are_addresses_and_apart():
  assert len({str(Address.parse(name)) for name in ALIASES}) == len(ALIASES)
  for name, target in ALIASES.items():
    assert Address.parse(name) == Address.parse(target)


def test_the_small_digest_is_gits(tmp_path: Path):
  # The well-known name of the empty blob.
  assert git_sha1(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
  assert check_file_name("a/b.gguf") == "a/b.gguf"

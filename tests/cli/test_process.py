"""What the command line makes of its process: streams, signals, environment, log lines."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from neurojax.cli.process import log_level
from tests import tinymodel

NEUROJAX = (sys.executable, "-m", "neurojax")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
  return str(tinymodel.write(tmp_path_factory.mktemp("process") / "tiny.gguf"))


def done(*argv: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
  """A command that ran; `shell` is what follows it, redirections for example."""
  return subprocess.run(
    ["bash", "-c", f'"$@" {shell}', "bash", *NEUROJAX, *argv],
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


@pytest.mark.parametrize(
  ("shell", "code"),
  [
    (">&-", 0),
    ("<&- >&-", 0),
    ("2>&-", 0),
    ("| head -c 0; exit ${PIPESTATUS[0]}", 0),
    (">/dev/full", 2),
  ],
)
def test_streams_that_are_closed_or_full_leave_no_trace(tmp_path: Path, shell: str, code: int):
  (tmp_path / "text").write_text("abc")
  ran = done("tokenize", "--model", "neurollm", "--file", str(tmp_path / "text"), shell=shell)
  assert ran.returncode == code and ran.stderr.count("\n") == (code != 0), ran.stderr


@pytest.mark.parametrize("argv", [("generate",), ("tokenize", "--model", "a", "--file", "/no")])
def test_an_error_that_nobody_reads_keeps_its_exit_code(argv: tuple[str, ...]):
  ran = done(*argv, shell="2>&1 | head -c 0; exit ${PIPESTATUS[0]}")
  assert ran.returncode == 2 and ran.stderr == ""


def test_training_goes_on_when_nobody_reads_its_lines():
  script = (
    "import sys\nfrom neurojax.cli.train import _say\n"
    "for step in range(1000): _say(f'step {step}')\n"
    "print('the end', file=sys.stderr)\n"
  )
  command = ["bash", "-c", '"$@" | head -c 0; exit ${PIPESTATUS[0]}', "bash", sys.executable, "-c"]
  ran = subprocess.run([*command, script], capture_output=True, text=True, timeout=60, check=False)
  assert (ran.returncode, ran.stderr) == (0, "the end\n")


def test_a_closed_stream_leaves_its_number_to_no_file(tmp_path: Path):
  script = (
    "import os\nfrom neurojax.cli.process import open_streams\nopen_streams()\n"
    f"assert os.open({str(tmp_path / 'new')!r}, os.O_CREAT) > 2\n"
  )
  command = ["bash", "-c", '"$@" <&- >&-', "bash", sys.executable, "-c", script]
  subprocess.run(command, check=True, timeout=60)


def test_text_that_the_encoding_lacks_is_written_with_backslashes(tmp_path: Path):
  (tmp_path / "text").write_text("é", encoding="utf-8")
  ran = done(
    *("tokenize", "--model", "neurollm", "--file", str(tmp_path / "text")),
    PYTHONIOENCODING="ascii",
  )
  assert ran.returncode == 0 and "\\x" in ran.stdout, ran.stderr


def test_ctrl_c_while_something_is_imported_ends_quietly():
  script = (
    "import sys\n"
    "class Interrupted:\n"
    "  def find_spec(self, name, *_):\n"
    "    if name == 'tyro': raise KeyboardInterrupt\n"
    "sys.meta_path.insert(0, Interrupted())\n"
    "sys.argv = ['neurojax', 'inspect', 'neurollm']\n"
    "from neurojax.cli import main\n"
    "sys.exit(main())\n"
  )
  ran = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
  assert (ran.returncode, ran.stdout, ran.stderr) == (130, b"", b"")


def test_jax_is_kept_to_32_bits_and_says_so(model: str):
  arguments = ("generate", "--model", model, "--prompt", "abc", "--max-tokens", "3", "--json")
  wide, plain = done(*arguments, JAX_ENABLE_X64="1"), done(*arguments)
  assert wide.returncode == 0 and "32 bits" in wide.stderr and plain.stderr == ""
  assert wide.stdout.partition("first_token_s")[0] == plain.stdout.partition("first_token_s")[0]


@pytest.mark.parametrize(
  ("platforms", "argv"),
  [
    ("cuda", ["generate", "--prompt", "abc"]),
    ("nonsense", ["generate", "--prompt", "abc"]),
    ("cuda", ["generate", "--prompt", "abc", "--stages", "2"]),
    ("cuda", ["stage", "--listen", "127.0.0.1:0"]),
  ],
  ids=str,
)
def test_a_device_that_jax_has_not_is_one_line(model: str, platforms: str, argv: list[str]):
  ran = done(*argv, "--model", model, JAX_PLATFORMS=platforms)
  assert ran.returncode == 2 and f"JAX_PLATFORMS={platforms}" in ran.stderr
  assert ran.stderr.count("\n") == 1 and "Unset JAX_PLATFORMS" in ran.stderr


@pytest.mark.parametrize("stages", [1, 2])
def test_a_device_that_jax_has_not_is_a_value_error_in_python(model: str, stages: int):
  script = (
    "import neurojax as nj\n"
    "try:\n"
    f"  nj.load({model!r}, stages={stages})\n"
    "except ValueError as error:\n"
    "  print(error)\n"
  )
  ran = subprocess.run(
    [sys.executable, "-c", script],
    env=os.environ | {"JAX_PLATFORMS": "cuda"},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert ran.stdout.startswith("JAX_PLATFORMS=cuda: JAX finds no such device"), ran.stderr


WRONG = (
  "generate --model neurollm --prompt a --temperature -1",
  "generate --model neurollm --prompt a --context 0",
  "generate --model neurollm --prompt a --max-tokens 0",
  "generate --model neurollm --prompt-file /nowhere/text",
  "generate --model /nowhere/model.gguf --prompt a",
  "generate --model neurollm --prompt a --plan /nowhere/plan.toml",
  "chat --model neurollm --top-p 0",
  "chat --model neurollm",
  "demo --temperature -1",
  "eval logits --model neurollm --tokens ids.json --out /nowhere/logits.npy",
  "size --memory 8GB --out-config /nowhere/size.toml",
)


def test_wrong_options_are_refused_before_jax_is_imported():
  script = (
    "import sys\nfrom neurojax.cli import main\n"
    f"for line in {WRONG}:\n"
    "  assert main(line.split()) == 2, line\n"
    "  assert 'jax' not in sys.modules, line\n"
  )
  subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_levels_of_log_lines():
  assert log_level(["a", "-v", "b"], {}) == ("debug", ["a", "b"])
  assert log_level(["--verbose"], {"NEUROJAX_LOG": "error"}) == ("debug", [])
  assert log_level(["a", "--", "-v"], {"NEUROJAX_LOG": "info"}) == ("info", ["a", "--", "-v"])
  assert log_level([], {"NEUROJAX_LOG": ""}) == ("warning", [])
  with pytest.raises(ValueError, match="NEUROJAX_LOG=loud"):
    log_level([], {"NEUROJAX_LOG": "loud"})


def test_colours_only_where_they_are_wanted():
  command = [*NEUROJAX, "tokenize", "--help"]
  for environment, coloured in ({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False):
    assert (b"\x1b[" in _on_a_terminal(command, environment)) == coloured


def _on_a_terminal(command: list[str], environment: dict[str, str]) -> bytes:
  """What a command writes to a terminal."""
  ours, theirs = pty.openpty()
  kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
  subprocess.run(
    command,
    env=kept | {"TERM": "xterm", "COLUMNS": "80"} | environment,
    stdin=theirs,
    stdout=theirs,
    stderr=theirs,
    check=True,
    timeout=60,
  )
  os.close(theirs)
  text = b""
  try:
    while part := os.read(ours, 1 << 16):
      text += part
  except OSError:
    pass  # Linux's way of saying that the other end is closed.
  os.close(ours)
  return text

"""The face: what `import neurojax` shows, and models that answer from scripts, loops and notebooks."""

import asyncio
import doctest
import gc
import importlib
import inspect
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import neurojax as nj
from neurojax.config import Sampling
from neurojax.files.find import PACKAGED
from neurojax.plan.fleet import read_fleet
from tests.pipeline.servers import cluster

ROOT = Path(__file__).parents[2]
NAMES = {
  "AsyncModel", "Completion", "EngineError", "Fleet", "Model", "ModelConfig", "Piece", "Plan",
  "Progress", "Report", "Sampling", "Score", "Serving", "TernaryArray", "Tokenizer", "TrainConfig",
  "__version__", "connect", "convert", "export", "inspect", "load", "plan", "quantize", "simulate",
  "size", "ternary_matmul", "train",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
  with nj.load("neurollm", context=256) as model:
    yield model


def python(code: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
  )


# ---- names


def test_importing_the_package_imports_neither_jax_nor_numpy():
  code = "import sys, neurojax; print(sorted({'jax', 'jaxlib', 'flax', 'numpy', 'grpc'} & set(sys.modules)))"
  assert python(code).stdout == "[]\n"


def test_the_public_names_are_these():
  assert set(nj.__all__) == NAMES and set(nj.__all__) <= set(dir(nj))


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_a_public_name_is_there_and_documented(name: str):
  value = getattr(nj, name)
  assert callable(value)
  function = value._function if isinstance(value, type(nj.plan)) else value
  assert inspect.getdoc(function), name


def test_another_name_is_none():
  with pytest.raises(AttributeError, match="no attribute 'lode'"):
    nj.lode  # noqa: B018


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_the_example_of_a_public_name_runs(name: str):
  value = getattr(nj, name)
  value = value._function if isinstance(value, type(nj.plan)) else value
  runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
  tests = [t for t in doctest.DocTestFinder(recurse=False).find(value, name) if t.examples]
  assert tests, f"{name} has no example"
  for test in tests:
    runner.run(test)
  assert runner.failures == 0 and runner.tries > 0


def test_a_room_that_is_a_verb_stays_a_room():
  best = importlib.import_module("neurojax.plan.best")
  assert nj.plan.best is best and "fleet" in inspect.signature(nj.plan).parameters


# ---- answers


def test_an_answer_is_text_with_its_tokens(model: nj.Model):
  answer = model.generate("The sea was", max_tokens=12, temperature=0.8, seed=7)
  assert isinstance(answer, nj.Completion) and str(answer) == answer.text
  assert answer.text == model.detokenize(answer.tokens)
  assert len(answer.tokens) == len(answer.logprobs) == 12 and answer.finish_reason == "length"
  assert (
    answer
    == model.generate("The sea was", max_tokens=12, sampling=Sampling(temperature=0.8, seed=7))
    or answer.tokens == model.generate("The sea was", max_tokens=12, temperature=0.8, seed=7).tokens
  )
  assert 0 < answer.times.first_token_s <= answer.times.total_s
  assert answer.text.split()[0] in answer._repr_html_()


def test_a_stream_gives_the_same_answer_piece_by_piece(model: nj.Model):
  whole = model.generate("Once", max_tokens=10)
  stream = model.stream("Once", max_tokens=10)
  pieces = list(stream)
  assert "".join(map(str, pieces)) == whole.text == stream.completion.text
  assert [piece.token for piece in pieces] == list(whole.tokens)
  assert [piece.finish_reason for piece in pieces] == [None] * 9 + ["length"]


def test_a_stream_left_early_frees_its_place(model: nj.Model):
  for _ in range(2 * model.serving.sequences):
    stream = model.stream("Once", max_tokens=200)
    next(stream)
    stream.close()
  for _ in range(2 * model.serving.sequences):
    next(model.stream("Once", max_tokens=200))
    gc.collect()
  assert len(model.generate("Once", max_tokens=3).tokens) == 3


def test_text_ends_before_a_stop_string(model: nj.Model):
  whole = model.generate("The sea was", max_tokens=20).text
  word = whole.split()[3]
  cut = model.generate("The sea was", max_tokens=20, stop=word)
  assert cut.text == whole[: whole.index(word)] and cut.finish_reason == "stop"


def test_a_score_is_that_of_generated_tokens(model: nj.Model):
  answer = model.generate("The sea was", max_tokens=6)
  score = model.score([*answer.prompt_tokens, *answer.tokens], first=len(answer.prompt_tokens))
  # A prompt and a step add up in other orders; of int8 a level may then round the other way, rarely.
  differences = np.abs(np.subtract(score.logprobs, answer.logprobs))
  assert np.median(differences) < 1e-4 and differences.max() < 0.1
  assert score.perplexity == pytest.approx(np.exp(-np.mean(score.logprobs)))


def test_what_cannot_be_is_refused_in_words(model: nj.Model):
  with pytest.raises(ValueError, match="the prompt is empty"):
    model.generate([])
  with pytest.raises(ValueError, match="temperature = -1"):
    model.generate("a", temperature=-1.0)
  with pytest.raises(TypeError, match="unknown option 'tempreture'"):
    model.generate("a", tempreture=1.0)
  with pytest.raises(ValueError, match="give one of them"):
    model.generate("a", sampling=Sampling(), seed=1)
  with pytest.raises(ValueError, match="no chat template"):
    model.chat("Hello")
  with pytest.raises(ValueError, match="at least two"):
    model.score([1])
  with pytest.raises(ValueError, match="made for at most 1024"):
    nj.load("neurollm", context=4096)
  with pytest.raises(ValueError, match="choose one of auto, dense"):
    nj.load("neurollm", weights="int3")
  with pytest.raises(ValueError, match="device 'cuda:7': this process has cpu:0"):
    nj.load("neurollm", devices="cuda:7")
  with pytest.raises(FileNotFoundError, match="neurolm"):
    nj.load("neurolm")


def test_closing_ends_an_answer_in_an_error():
  for taken in (1, 2, 5):
    model = nj.load("neurollm", context=1024)
    stream = model.stream("The sea", max_tokens=1000, ignore_eos=True)
    for _ in range(taken):
      next(stream)
    closing = threading.Thread(target=model.close)
    closing.start()
    with pytest.raises((ValueError, nj.EngineError), match="closed"):
      for _ in stream:
        pass
    closing.join(10.0)
    assert not closing.is_alive()


def test_a_plan_from_python_is_that_of_the_verb():
  made = nj.plan("llama-8b", "lab", weights="w2a8", objective="throughput")
  given = nj.plan("llama-8b", "lab", weights="w2a8", objective="throughput", sequences=4)
  assert made.sequences is not None and made.throughput >= given.throughput
  config = nj.ModelConfig.named("llama-8b")
  assert nj.plan(config, read_fleet("lab"), weights="w2a8").stages
  assert "<table" in made._repr_html_() and "<table" in nj.size("8GB")._repr_html_()


def test_a_closed_model_says_so():
  model = nj.load("neurollm", context=128)
  model.close()
  model.close()
  with pytest.raises(ValueError, match="closed: load it again"):
    model.generate("a")
  assert "closed" in repr(model) and "closed" in model._repr_html_()


def test_progress_is_told():
  seen = []
  nj.load("neurollm", context=128, progress=seen.append).close()
  assert seen[0] == nj.Progress("reading layers", 0, 12)
  assert nj.Progress("reading layers", 12, 12) in seen and seen[-1].what == "compiling"


def test_threads_may_ask_at_once(model: nj.Model):
  wanted = model.generate("The sea", max_tokens=8).tokens
  found = [None] * 4

  def ask(i: int) -> None:
    found[i] = model.generate("The sea", max_tokens=8).tokens

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == [wanted] * 4


# ---- beside a loop


def test_blocking_methods_and_coroutines_work_in_a_running_loop(model: nj.Model):
  wanted = model.generate("The sea", max_tokens=6)

  async def main():
    blocking = model.generate("The sea", max_tokens=6)
    awaited = await model.aio.generate("The sea", max_tokens=6)
    stream = model.aio.stream("The sea", max_tokens=6)
    pieces = [piece async for piece in stream]
    many = await asyncio.gather(*(model.aio.generate("The sea", max_tokens=6) for _ in range(3)))
    assert blocking.tokens == awaited.tokens == stream.completion.tokens == wanted.tokens
    assert [piece.token for piece in pieces] == list(wanted.tokens)
    assert {answer.tokens for answer in many} == {wanted.tokens}
    left = model.aio.stream("The sea", max_tokens=200)
    await anext(left)
    await left.aclose()
    score = await model.aio.score("The sea was blue")
    assert score.logprobs == model.score("The sea was blue").logprobs
    assert (await model.aio.report()).stages[0].last_layer == 11

  asyncio.run(main())


def test_a_cancelled_coroutine_frees_its_place(model: nj.Model):
  async def main():
    for _ in range(2 * model.serving.sequences):
      with pytest.raises(TimeoutError):
        await asyncio.wait_for(model.aio.generate("The sea", max_tokens=250), 0.05)
    return await model.aio.generate("The sea", max_tokens=4)

  assert len(asyncio.run(main()).tokens) == 4


def test_three_lines_in_a_script():
  code = (
    "import neurojax as nj\n"
    "model = nj.load('neurollm', context=128)\n"
    "print(model.generate('The sea was', max_tokens=8, temperature=0.8, seed=7))\n"
  )
  done = python(code)
  assert done.returncode == 0 and done.stderr == ""
  assert done.stdout.strip()


def test_three_lines_in_ipython_with_a_running_loop():
  code = (
    "from IPython.core.interactiveshell import InteractiveShell\n"
    "import asyncio\n"
    "shell = InteractiveShell.instance()\n"
    "async def main():\n"
    "  async def run(text):\n"
    "    done = await shell.run_cell_async(text, transformed_cell=shell.transform_cell(text))\n"
    "    done.raise_error()\n"
    "  await run('import neurojax as nj')\n"
    "  await run('model = nj.load(\"neurollm\", context=128)')\n"
    "  await run('print(model.generate(\"The sea was\", max_tokens=8))')\n"
    "asyncio.run(main())\n"
  )
  done = python(code)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip()


def test_a_notebook_shows_answers_and_reports():
  cells = [
    "import neurojax as nj",
    "model = nj.load('neurollm', context=128)",
    "model.generate('The sea was', max_tokens=8)",
    "model.report()",
    "nj.inspect('neurollm')",
    "(await model.aio.generate('The sea was', max_tokens=8)).tokens == model.generate('The sea was', max_tokens=8).tokens",
    "model.close()",
  ]
  book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
  NotebookClient(
    book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
  ).execute()
  bars = [output for output in book.cells[1].outputs if output.output_type == "display_data"]
  assert len(bars) == 1 and not bars[0].data["text/html"]
  shown = [cell.outputs[0].data for cell in book.cells[2:6]]
  assert "tokens" in shown[0]["text/html"] and "<table>" in shown[1]["text/html"]
  assert "neurollm" in shown[2]["text/html"] and shown[3]["text/plain"] == "True"


# ---- arrays


def test_quantize_takes_real_numbers_and_a_dtype_of_scales():
  w = np.full((128, 2), 1e-8)
  with pytest.raises(ValueError, match=r"row 0, group 0: .* scale_dtype='float32'"):
    nj.quantize(w)
  packed = nj.quantize(w, scale_dtype="float32")
  np.testing.assert_array_equal(packed.dequantize(), w.astype(np.float32))
  eye = np.eye(128, dtype=np.int8)
  np.testing.assert_array_equal(nj.quantize(eye, exact=True).dequantize(), eye)
  for dtype in (np.complex64, "U3", object):
    with pytest.raises(ValueError, match=r"w is .*: pass real numbers"):
      nj.quantize(np.ones((64, 2), dtype))
  with pytest.raises(ValueError, match="contracted_axes=2"):
    nj.quantize(w, contracted_axes=2)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize(
  ("shape", "axes", "spec"),
  [((64, 5), 1, "...k,kn->...n"), ((64, 2, 3), 1, "...k,knh->...nh"),
   ((4, 16, 5), 2, "...ab,abn->...n"), ((5, 4, 16), -2, "...ab,nab->...n")],
)  # fmt: skip
def test_ternary_matmul_is_an_einsum_over_the_contracted_axes(batch, shape, axes, spec):
  rng = np.random.default_rng(0)
  w = nj.quantize(rng.standard_normal(shape), contracted_axes=axes, group_size=None)
  x = rng.standard_normal((*batch, *w.contraction.contracted_shape)).astype(np.float32)
  y = nj.ternary_matmul(x, w)
  wanted = np.einsum(spec, x, np.asarray(w.dequantize()))
  assert y.dtype == np.float32
  np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5, strict=True)


def test_ternary_matmul_refuses_what_does_not_fit():
  w = nj.quantize(np.ones((64, 5)))
  with pytest.raises(ValueError, match=r"\(2, 63\) and ends in \(63,\): .* contracts \(64,\)"):
    nj.ternary_matmul(np.ones((2, 63), np.float32), w)
  with pytest.raises(ValueError, match="x is int32: cast it"):
    nj.ternary_matmul(np.ones((2, 64), np.int32), w)


def test_arguments_of_other_types_are_refused_without_a_checker_of_types():
  # In a process of its own: here annotations are checked before the functions run.
  calls = {
    "nj.quantize(w, group_size=64.0)": "group_size = 64.0: a positive multiple of 64, or None",
    "nj.quantize(w, group_size=True)": "group_size = True: a positive multiple of 64, or None",
    "nj.quantize(w, mode='w2a4')": "mode = 'w2a4': one of w2a16, w2a8",
    "nj.quantize(w, scale_dtype='int4x')": "scale_dtype = 'int4x': one of float16, bfloat16, float32",
    "nj.quantize(w, contracted_axes=1.0)": "contracted_axes=1.0 of shape (64, 2)",
    "nj.ternary_matmul(w, w)": "w is a ndarray: pass a TernaryArray",
  }
  code = f"""
import numpy as np, neurojax as nj
w = np.ones((64, 2))
for call in {list(calls)}:
  try:
    eval(call)
  except (TypeError, ValueError) as error:
    print(type(error).__name__, error)
"""
  said = python(code).stdout.splitlines()
  for line, (call, message) in zip(said, calls.items(), strict=True):
    assert line.startswith(f"{'TypeError' if 'matmul' in call else 'ValueError'} {message}")


# ---- stages


def test_stages_and_servers_give_the_tokens_of_one_process(model: nj.Model):
  wanted = model.generate("The sea was", max_tokens=8, temperature=0.8, seed=3)
  with nj.load("neurollm", context=256, stages=2, devices="cpu") as cut:
    assert len(cut.report().stages) == 2
    found = cut.generate("The sea was", max_tokens=8, temperature=0.8, seed=3)
    assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs)
  with cluster(PACKAGED, 2) as servers:
    where = ",".join(servers.addresses)
    with nj.connect(where, "neurollm", context=256) as far:
      found = far.generate("The sea was", max_tokens=8, temperature=0.8, seed=3)
      assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs)
      assert [stage.first_layer for stage in far.report().stages] == [0, 6]
    with nj.connect(servers.fleet(), "neurollm", context=256) as far:
      assert far.generate("The sea was", max_tokens=1).tokens


# ---- what a stranger tried


def test_streams_in_circles_are_collected_without_a_hang(model: nj.Model):
  class Session:
    def __init__(self):
      self.stream, self.me = model.stream("The sea", max_tokens=200), self
      next(self.stream)

  async def collect():
    gc.collect()

  for _ in range(3 * model.serving.sequences):
    Session()
    model._runner.call(collect())
    gc.collect()
  assert len(model.generate("The sea", max_tokens=3).tokens) == 3


def test_a_model_that_is_dropped_ends_its_thread():
  before = threading.active_count()
  for _ in range(3):
    nj.load("neurollm", context=128)
    gc.collect()
  deadline_s = time.monotonic() + 20
  while threading.active_count() > before and time.monotonic() < deadline_s:
    time.sleep(0.05)
  assert threading.active_count() <= before


@pytest.mark.parametrize(
  ("options", "error", "named"),
  [
    ({"prompt": b"abc"}, TypeError, "the prompt is bytes"),
    ({"prompt": [1.7]}, TypeError, "whole numbers"),
    ({"max_tokens": 1.5}, ValueError, "max_tokens = 1.5"),
    ({"max_tokens": None}, ValueError, "max_tokens = None"),
    ({"top_k": 1.5}, ValueError, "top_k = 1.5"),
    ({"seed": "1"}, ValueError, "seed = '1'"),
    ({"temperature": None}, ValueError, "temperature = None"),
    ({"stop": ("",)}, ValueError, "stop = ''"),
    ({"sampling": 5}, TypeError, "give a Sampling"),
    ({"foo": 1}, TypeError, "options are .*ignore_eos.*max_tokens"),
  ],
  ids=str,
)
def test_a_wrong_option_is_named(model: nj.Model, options: dict, error: type, named: str):
  with pytest.raises(error, match=named):
    model.generate(**{"prompt": "The sea", "max_tokens": 3, **options})


@pytest.mark.parametrize(
  ("call", "error", "named"),
  [
    (lambda: nj.load(None), TypeError, "model = None"),
    (lambda: nj.load("neurollm", stages="2"), ValueError, "stages = '2'"),
    (lambda: nj.load("neurollm", stages=13), ValueError, "the model has 12 layers"),
    (lambda: nj.load("neurollm", step_timeout_s=float("nan")), ValueError, "step_timeout_s = nan"),
    (lambda: nj.load("neurollm", context="5"), ValueError, "context = '5': a whole number"),
    (lambda: nj.connect(None), TypeError, "where = None"),
    (lambda: nj.plan("llama-8b", "lab", objective="latncy"), ValueError, "objective = 'latncy'"),
    (lambda: nj.plan("llama-8b", "lab", batch=0), ValueError, "batch = 0"),
    (lambda: nj.size("64GB", purpose="trian"), ValueError, "purpose = 'trian'"),
    (lambda: nj.size(None), TypeError, "memory = None"),
    (lambda: nj.size(True), TypeError, "memory = True"),
    (
      lambda: nj.plan(nj.ModelConfig.named("llama-8b"), "lab", weights="w2a8", form="x"),
      ValueError, "form = 'x'",
    ),
  ],
)  # fmt: skip
def test_a_wrong_argument_is_named(call, error: type, named: str):
  with pytest.raises(error, match=named):
    call()


def test_help_and_completion_show_arguments():
  assert "fleet" in nj.plan.__doc__ and "overrides" in nj.train.__doc__
  for method in (nj.Model.generate, nj.Model.stream_chat, nj.AsyncModel.chat):
    shown = inspect.signature(method).parameters
    assert {"max_tokens", "temperature", "stop"} <= set(shown)

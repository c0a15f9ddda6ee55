"""Train every size with ternary and with bfloat16 weights, and see what the gap is.

python -m experiments.ternary_gap.run --data DIR                    (what results.csv lacks)
python -m experiments.ternary_gap.run --data DIR --minutes 9 --jobs 2
python -m experiments.ternary_gap.run --data DIR --only 3m ternary 0.012 [--seed 1]
python -m experiments.ternary_gap.run --estimate                    (how long what is missing takes)
python -m experiments.ternary_gap.run --fit --plot                  (fit.csv, gap.csv, gap.svg, README)

A finished run is a row at once. One that was ended goes on from its folder in --workdir when the same
command is given again.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.ternary_gap import figure, fit, plan
from experiments.ternary_gap.plan import Plan, Row, Run
from neurojax.data.token_shards import read_meta

RESULTS = plan.HERE / "results.csv"
NEUROJAX = (sys.executable, "-m", "neurojax")
_WORKDIR = plan.ROOT / "build" / "ternary_gap"
_GRACE_S = 90
"""What a run that is asked to end may take for its checkpoint."""
_LEAST_S = 40
"""With less time left no run is started: it would not get past compiling."""


class Runner:
  """Runs what is missing, some at once, until time is up; rows are written as runs end.

  Args:
    program: What `train` and its options are given to.
  """

  def __init__(
    self,
    config: Plan,
    *,
    data: Path,
    workdir: Path,
    results: Path,
    jobs: int = 1,
    seconds: float | None = None,
    device: str = "",
    program: Sequence[str] = NEUROJAX,
  ):
    self._config, self._data, self._workdir, self._results = config, data, workdir, results
    self._jobs, self._device, self._program = jobs, device, tuple(program)
    self._deadline = None if seconds is None else time.monotonic() + seconds
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self.failed: list[str] = []

  def stop(self) -> None:
    """Ask all runs to end with a checkpoint."""
    self._stop.set()

  def go(self, runs: Sequence[Run]) -> int:
    """Returns how many of them have no row at the end."""
    self._workdir.mkdir(parents=True, exist_ok=True)
    waiting = list(reversed(self._missing(runs)))

    def work() -> None:
      while not self._ended(_LEAST_S):
        with self._lock:
          if not waiting:
            return
          run = waiting.pop()
        try:
          self._one(run)
        except Exception as error:
          self._fail(run, repr(error))

    threads = [threading.Thread(target=work) for _ in range(self._jobs)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return len(self._missing(runs))

  def _missing(self, runs: Sequence[Run]) -> list[Run]:
    done = {row.run for row in plan.read(self._results)}
    return [run for run in runs if run not in done]

  def _ended(self, margin_s: float = 0.0) -> bool:
    late = self._deadline is not None and time.monotonic() > self._deadline - margin_s
    return late or self._stop.is_set()

  def _one(self, run: Run) -> None:
    folder = self._workdir / run.name
    options, written = run.options(self._config), self._workdir / f"{run.name}.json"
    wanted = json.dumps(options)
    if folder.exists() and written.is_file() and written.read_text(encoding="utf-8") != wanted:
      return self._fail(run, f"{folder} was begun with other options: take it away")
    written.write_text(wanted, encoding="utf-8")
    if self._keep(run, folder):
      return None
    code = self._train(run, folder)
    # Minus: the signal came before the training process was listening.
    if code in (143, 130, -signal.SIGTERM, -signal.SIGINT) and self._ended():
      print(f"-- {run.name}: ended early; the same command goes on", flush=True)
    elif not self._keep(run, folder, diverged=code == 1 and plan.has_diverged(folder)):
      log = self._workdir / f"{run.name}.log"
      tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
      self._fail(run, "\n".join([f"exit code {code}, {log}:", *tail]))
    return None

  def _fail(self, run: Run, reason: str) -> None:
    with self._lock:
      self.failed.append(run.name)
    print(f"!! {run.name}: {reason}", file=sys.stderr, flush=True)

  def _train(self, run: Run, folder: Path) -> int:
    """The exit code of the training process, which is asked to end when time is up."""
    command = [*self._program, *run.arguments(self._config, self._data, folder)]
    environment = dict(os.environ)
    if self._jobs > 1:
      environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / self._jobs:.3f}"
    print(f"== {run.name}", flush=True)
    with (self._workdir / f"{run.name}.log").open("ab") as log:
      process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=plan.ROOT
      )
      try:
        while process.poll() is None and not self._ended():
          time.sleep(0.2)
        if process.poll() is None:
          process.send_signal(signal.SIGTERM)
        return process.wait(timeout=_GRACE_S)
      except subprocess.TimeoutExpired:
        return 143
      finally:
        if process.poll() is None:
          process.kill()
          process.wait()

  def _keep(self, run: Run, folder: Path, *, diverged: bool = False) -> bool:
    """Make a finished run a row of the results. Returns whether it was finished."""
    row = plan.outcome(
      self._config,
      run,
      folder,
      device=self._device,
      at_once=self._jobs,
      diverged=diverged,
    )
    if row is None:
      return False
    with self._lock:
      rows = [*plan.read(self._results), row]
      plan.comparable(rows, self._config)
      plan.write(self._results, rows, self._config)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    rate = f"{row.tokens_per_s:,.0f} tokens/s" if row.tokens_per_s else "-"
    print(f"-- {run.name}: {row.outcome}, held-out loss {row.valid_loss}, {rate}", flush=True)
    return True


def estimate(config: Plan, runs: Sequence[Run], rows: Sequence[Row]) -> str:
  """How long runs take one after the other, from the speed of finished ones where there are any."""
  done = {row.run for row in rows}
  lines, total = [], 0.0
  for size in config.sizes:
    here = [run for run in runs if run.size == size.name and run not in done]
    seen = [row.tokens_per_s for row in rows if row.size == size.name and row.tokens_per_s]
    rate = statistics.median(seen) if seen else size.tokens_per_s
    # An evaluation has a third of a training step's work.
    held_out = config.eval_batches * config.batch_size * config.seq_len / 3
    seconds = config.start_s + (config.tokens + held_out) / rate
    total += seconds * len(here)
    lines.append(
      f"{size.name:>5}: {len(here):2} runs of {config.tokens:,} tokens, {seconds:4.0f} s each at"
      f" {rate:,.0f} tokens/s ({'measured' if seen else 'a guess'})"
    )
  return "\n".join([*lines, f"in all {total / 60:.1f} minutes, one run at a time"])


def device_name() -> str:
  """Of the GPU, asked in a process of its own, which leaves the memory to the runs."""
  question = "from neurojax.kernels import measure; print(measure.origin()['device'])"
  done = subprocess.run(
    [sys.executable, "-c", question], stdout=subprocess.PIPE, text=True, check=True, cwd=plan.ROOT
  )
  return done.stdout.strip().splitlines()[-1]


def chosen(config: Plan, arguments: argparse.Namespace) -> list[Run]:
  if arguments.only:
    size, weights, rate = arguments.only
    if weights not in plan.WEIGHTS:
      raise ValueError(f"weights {weights!r}: choose one of {', '.join(plan.WEIGHTS)}")
    return [Run(config.size(size).name, weights, float(rate), arguments.seed)]
  names = [config.size(name).name for name in arguments.sizes or [s.name for s in config.sizes]]
  return [run for run in config.runs() if run.size in names]


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", type=Path, help="folder of `neurojax data prepare`")
  parser.add_argument("--workdir", type=Path, default=_WORKDIR, help="folder of the runs")
  parser.add_argument("--only", nargs=3, metavar=("SIZE", "WEIGHTS", "LR"))
  parser.add_argument("--seed", type=int, default=0, help="of --only")
  parser.add_argument("--sizes", nargs="+", metavar="SIZE")
  parser.add_argument("--minutes", type=float, help="end after so long, runs saved")
  parser.add_argument("--jobs", type=int, default=1, help="runs that share the device")
  parser.add_argument("--estimate", action="store_true")
  parser.add_argument("--fit", action="store_true")
  parser.add_argument("--plot", action="store_true")
  arguments = parser.parse_args(argv)
  try:
    config = Plan.load()
    runs, rows = chosen(config, arguments), plan.read(RESULTS)
    if arguments.estimate:
      print(estimate(config, runs, rows))
      return 0
    if arguments.fit or arguments.plot:
      if arguments.fit:
        print(fit.write(rows, config))
      if arguments.plot:
        figure.draw(rows, config)
      return 0
    if arguments.data is None:
      raise ValueError("--data is missing: name a folder of `neurojax data prepare`")
    return train(config, runs, arguments)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f"ternary_gap: {error}")


def train(config: Plan, runs: Sequence[Run], arguments: argparse.Namespace) -> int:
  identity = read_meta(arguments.data).identity()
  rows = plan.read(RESULTS)
  plan.comparable(rows, config)
  if rows and not identity.startswith(rows[0].data):
    raise ValueError(
      f"{RESULTS} has runs on data {rows[0].data}, {arguments.data} is {identity[:12]}: prepare the"
      " same, or take the file away"
    )
  runner = Runner(
    config,
    data=arguments.data.resolve(),
    workdir=arguments.workdir.resolve(),
    results=RESULTS,
    jobs=arguments.jobs,
    seconds=None if arguments.minutes is None else arguments.minutes * 60,
    device=device_name(),
  )
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: runner.stop())
  left = runner.go(runs)
  print(
    f"{len(runs) - left} of {len(runs)} runs are in {RESULTS.name}, {left} are left", flush=True
  )
  return 1 if runner.failed else 0


if __name__ == "__main__":
  sys.exit(main())

"""What the server counts, for Prometheus: by vLLM's names where they mean the same, else by ours."""

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from neurojax.engine.api import Engine, EngineError, EngineLoad, Request, StageReport
from neurojax.engine.text import TextPiece

_GAP_S = (
  0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
)  # fmt: skip
_FIRST_S = (
  0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)  # fmt: skip
_WHOLE_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_TOKENS = tuple(k * 10**e for e in range(5) for k in (1, 2, 5))


class Metrics:
  """Counts what a server does. Its text is read by Prometheus.

  Args:
    model: Name of the model, which is a label.
    engine: Asked for what it is busy with, and for its stages, whenever the text is read.
  """

  def __init__(self, model: str, engine: Engine):
    self._engine, self._model = engine, model
    self._registry = CollectorRegistry(auto_describe=True)
    self._reports: tuple[StageReport, ...] = ()
    self._is_up = True
    self._registry.register(_Live(self))

    def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
      made = Histogram(
        f"vllm:{name}", text, ["model_name"], buckets=tuple(buckets), registry=self._registry
      )
      return made.labels(model)

    def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
      return Counter(name, text, ["model_name", *labels], registry=self._registry)

    self._first = histogram("time_to_first_token_seconds", "Request to first token.", _FIRST_S)
    self._gap = histogram("inter_token_latency_seconds", "Between tokens of an answer.", _GAP_S)
    self._mean = histogram(
      "request_time_per_output_token_seconds", "Mean gap between an answer's tokens.", _GAP_S
    )
    self._whole = histogram("e2e_request_latency_seconds", "Request to its last token.", _WHOLE_S)
    self._queued = histogram("request_queue_time_seconds", "Request to its slot.", _WHOLE_S)
    self._prefill = histogram("request_prefill_time_seconds", "Slot to first token.", _WHOLE_S)
    self._decode = histogram("request_decode_time_seconds", "First to last token.", _WHOLE_S)
    self._prompt = histogram("request_prompt_tokens", "Tokens of prompts.", _TOKENS)
    self._answer = histogram("request_generation_tokens", "Tokens of answers.", _TOKENS)
    self._most = histogram("request_params_max_tokens", "Tokens that were asked for.", _TOKENS)
    self._n = histogram("request_params_n", "Answers that were asked for.", (1, 2, 5, 10, 20))
    self._tokens = counter("vllm:generation_tokens", "Tokens of answers.").labels(model)
    self._ended = counter("vllm:request_success", "Answers that ended.", ["finished_reason"])
    self._failed = counter("neurojax:request_failures", "Requests that the engine failed.")
    self._refused = counter("neurojax:queue_refusals", "Requests that found the queue full.")
    self._refused.labels(model)
    self._failed.labels(model)
    self._http = counter("neurojax:http_requests", "HTTP requests.", ["path", "status"])

  def request(self, request: Request) -> "Watch":
    """Look at the answers of a request."""
    self._prompt.observe(len(request.prompt))
    self._most.observe(request.max_tokens)
    self._n.observe(request.n)
    return Watch(self)

  def failed(self) -> None:
    self._failed.labels(self._model).inc()

  def refused(self) -> None:
    self._refused.labels(self._model).inc()

  def http(self, path: str, status: int) -> None:
    self._http.labels(self._model, path, str(status)).inc()

  async def text(self) -> bytes:
    """All metrics, as Prometheus reads them."""
    try:
      self._reports, self._is_up = await self._engine.reports(), True
    except EngineError:
      self._is_up = False
    return generate_latest(self._registry)


class Watch:
  """Times the answers of one request."""

  def __init__(self, metrics: Metrics):
    self._metrics, self._began_s = metrics, time.perf_counter()
    # Of each answer: when its first and its last token came, and how many there are.
    self._answers: dict[int, list[float]] = {}

  def see(self, piece: TextPiece) -> None:
    metrics, now_s = self._metrics, time.perf_counter()
    answer = self._answers.get(piece.token.answer)
    metrics._tokens.inc()
    if answer is None:
      answer = self._answers[piece.token.answer] = [now_s, now_s, 0]
      metrics._first.observe(now_s - self._began_s)
    else:
      metrics._gap.observe(now_s - answer[1])
      answer[1] = now_s
    answer[2] += 1
    if piece.finish_reason is not None:
      self._end(piece, *answer)

  def _end(self, piece: TextPiece, first_s: float, last_s: float, count: float) -> None:
    metrics = self._metrics
    metrics._whole.observe(last_s - self._began_s)
    metrics._decode.observe(last_s - first_s)
    metrics._answer.observe(count)
    if count > 1:
      metrics._mean.observe((last_s - first_s) / (count - 1))
    if (times := piece.token.times) is not None:
      metrics._queued.observe(times.queued_s)
      metrics._prefill.observe(times.prefill_s)
    assert piece.finish_reason is not None
    metrics._ended.labels(metrics._model, piece.finish_reason).inc()


class _Live:
  """What is asked of the engine when the metrics are read."""

  def __init__(self, metrics: Metrics):
    self._metrics = metrics

  def describe(self) -> Iterable[Metric]:
    return ()

  def collect(self) -> Iterable[Metric]:
    metrics = self._metrics
    load, labels = metrics._engine.load(), [metrics._model]
    for name, text, of in _GAUGES:
      gauge = GaugeMetricFamily(name, text, labels=["model_name"])
      gauge.add_metric(labels, of(load))
      yield gauge
    for name, text, of in _COUNTERS:
      counter = CounterMetricFamily(name, text, labels=["model_name"])
      counter.add_metric(labels, of(load))
      yield counter
    yield from self._stages()

  def _stages(self) -> Iterable[Metric]:
    metrics = self._metrics
    names = ["model_name", "stage", "host"]
    up = GaugeMetricFamily(
      "neurojax:stages_up", "Whether all stages answer.", labels=["model_name"]
    )
    up.add_metric([metrics._model], float(metrics._is_up))
    yield up
    step = GaugeMetricFamily("neurojax:stage_step_seconds", "Mean decode step.", labels=names)
    wire = GaugeMetricFamily("neurojax:stage_wire_seconds", "Mean way to the stage.", labels=names)
    weights = GaugeMetricFamily("neurojax:stage_weight_bytes", "Bytes of weights.", labels=names)
    steps = CounterMetricFamily("neurojax:stage_decode_steps", "Decode steps.", labels=names)
    for number, report in enumerate(metrics._reports):
      labels = [metrics._model, str(number), report.host]
      weights.add_metric(labels, report.weight_bytes)
      steps.add_metric(labels, report.decode_steps)
      if report.step_s is not None:
        step.add_metric(labels, report.step_s)
      if report.wire_s is not None:
        wire.add_metric(labels, report.wire_s)
    yield from (step, wire, weights, steps)


_Of = Callable[[EngineLoad], float]
_GAUGES: tuple[tuple[str, str, _Of], ...] = (
  ("vllm:num_requests_running", "Answers that have a slot.", lambda load: load.running),
  ("vllm:num_requests_waiting", "Requests that wait for a slot.", lambda load: load.queued),
  ("neurojax:slots", "Answers that can run at the same time.", lambda load: load.slots),
  ("neurojax:prefix_places", "Blocks of prompts that can be kept.", lambda load: load.places),
  ("neurojax:prefix_blocks", "Blocks of prompts that are kept.", lambda load: load.blocks),
)
_COUNTERS: tuple[tuple[str, str, _Of], ...] = (
  ("vllm:prompt_tokens", "Tokens of prompts of ended answers.", lambda load: load.prompt_tokens),
  ("vllm:prefix_cache_queries", "Tokens looked for.", lambda load: load.prompt_tokens),
  ("vllm:prefix_cache_hits", "Tokens that were kept.", lambda load: load.cached_tokens),
  ("vllm:num_preemptions", "Answers that had to make room.", lambda load: load.preempted),
)

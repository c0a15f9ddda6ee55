"""Simulates a plan that serves requests, event by event.

Every stage computes one step at a time and every link carries one message at a time, both in the order of
arrival; the latency of a link delays no other message. A prompt goes through in chunks that follow each other at
once. A decoded token comes back before the next one goes. `batch` sequences of the plan go through together.

Where several places hold the same layers, each group of sequences takes one way through and stays on it; ways
are chosen in turn by their shares. If a host fails, the caches of all sequences that pass it are lost: these
sequences fail, and start again from their prompt if they are retried, on another way or once the host is back.
"""

import dataclasses
import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Sequence

from neurojax.count.wording import counted, short
from neurojax.plan.notebook import shown
from neurojax.plan.plan import Hop, Plan, Stage

MAX_ATTEMPTS = 100
MOST_EVENTS = 200_000_000
"""Events of a simulation at most: about ten minutes of one core. Failures add events that are not counted
beforehand."""
MOST_FAILURES = 1e6
"""Failures of a host in an hour at most."""
MOST_IN_VAIN = 100_000
"""Failures in a row, with no request started between them, after which a simulation ends in an error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
  """A host that fails at a time, in seconds from the start."""

  host: str
  at_s: float

  def __post_init__(self) -> None:
    if not 0 <= self.at_s < math.inf:
      raise ValueError(f"failure of {self.host} at {self.at_s} s: the time must be 0 or later")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
  """The use of a stage or a link.

  Attributes:
    name: Label of the place, or both ends of the link.
    busy: Fraction of the time that it was in use.
    tokens: Tokens that it computed or carried.
  """

  name: str
  busy: float
  tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
  """Percentiles in seconds; None where nothing was measured."""

  p50_s: float | None
  p95_s: float | None
  p99_s: float | None
  max_s: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """The result of a simulation.

  Attributes:
    duration_s: Seconds from the first request to the last answer.
    requests: Requests that were served.
    tokens: Tokens of the answers that were completed.
    tokens_per_s: Mean rate, beginning and end included.
    steady_tokens_per_s: Mean rate without the first and the last fifth of the tokens.
    first_token_s: Seconds from a request's (last) start to its first token, of completed answers.
    token_s: Seconds between two tokens of an answer.
    request_s: Seconds from a request's first start to its last token.
    stages, links: Use of every stage and link.
    failures: Hosts that failed.
    restarts: Attempts that failures ended.
    failed: Requests that got no answer.
    lost_tokens: Positions computed for attempts that failed, summed over stages.
    events: Events that were simulated.
  """

  duration_s: float
  requests: int
  tokens: int
  tokens_per_s: float
  steady_tokens_per_s: float
  first_token_s: Spread
  token_s: Spread
  request_s: Spread
  stages: tuple[Use, ...]
  links: tuple[Use, ...]
  failures: int
  restarts: int
  failed: int
  lost_tokens: int
  events: int

  def summary(self) -> str:
    """One line: what was served, and how fast."""
    return (
      f"{self.tokens} tokens of {counted(self.requests - self.failed, 'answer')} in "
      f"{self.duration_s:.4g} s: {short(self.tokens_per_s, 4)} tokens/s, "
      f"{short(self.steady_tokens_per_s, 4)} in the middle"
    )

  def _repr_html_(self) -> str:
    waits = (
      ("until the first token", self.first_token_s),
      ("between two tokens", self.token_s),
      ("for a whole answer", self.request_s),
    )
    rows = [
      (what, *("-" if value is None else f"{value:.4g} s" for value in dataclasses.astuple(spread)))
      for what, spread in waits
    ]
    busy = max((*self.stages, *self.links), key=lambda use: use.busy)
    failures = (
      f" {counted(self.failures, 'failure')} ended {counted(self.restarts, 'attempt')}."
      if self.failures
      else ""
    )
    sentence = f"{self.summary()}. Busiest: {busy.name}, {busy.busy:.0%} of the time.{failures}"
    return shown(sentence, ("waiting", "median", "95%", "99%", "longest"), rows)


class _Server:
  """A device or a link, which serves one after the other in the order of arrival."""

  __slots__ = ("busy_s", "free_s", "name", "tokens")

  def __init__(self, name: str):
    self.name, self.free_s, self.busy_s, self.tokens = name, 0.0, 0.0, 0

  def take(self, now_s: float, for_s: float) -> float:
    start_s = self.free_s if self.free_s > now_s else now_s
    self.free_s = start_s + for_s
    self.busy_s += for_s
    return self.free_s

  def drop(self, now_s: float, until_s: float) -> None:
    """Forget all work under way and waiting; serve again from `until_s` on."""
    # Work is queued without a gap: all of it that lies after now is not done yet.
    self.busy_s -= max(0.0, self.free_s - now_s)
    self.free_s = until_s


@dataclasses.dataclass(eq=False)
class _Way:
  """One way through a pipeline: its stages in order, and the hops before, between and after them."""

  stages: list[Stage]
  hops: list[Hop]
  devices: list[_Server]
  links: list[_Server]


@dataclasses.dataclass(eq=False)
class _Pipeline:
  """One pipeline.

  Attributes:
    onward: Hops by the label they start from.
    way: The only way through, where no two places hold the same layers.
    taken: Groups that took each hop so far.
    active: Groups under way.
  """

  stages: list[Stage]
  onward: dict[str, list[Hop]]
  way: _Way | None = None
  taken: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
  active: set["_Group"] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(eq=False)
class _Group:
  """Sequences that go through together. Events of an earlier attempt (`epoch`) are ignored."""

  size: int
  begun_s: float
  start_s: float = 0.0
  epoch: int = 0
  pipeline: _Pipeline | None = None
  way: _Way | None = None
  prefilling: int = 0
  answered: int = 0
  last_s: float = 0.0
  work: int = 0
  firsts: list[float] = dataclasses.field(default_factory=list)
  gaps: list[float] = dataclasses.field(default_factory=list)
  times: list[float] = dataclasses.field(default_factory=list)


def simulate(
  plan: Plan,
  *,
  requests: int,
  concurrency: int,
  prompt: int,
  answer: int,
  failures: Sequence[Failure] = (),
  failures_per_hour: float = 0.0,
  repair_s: float = 60.0,
  retry: bool = True,
  within_plan: bool = False,
  seed: int = 0,
) -> Result:
  """Simulate a plan that serves `requests` requests, `concurrency` of them at a time.

  Args:
    prompt: Tokens of each prompt.
    answer: Tokens of each answer.
    failures: Hosts that fail, each at its time.
    failures_per_hour: Failures of each host in an hour while it is up, at random times.
    repair_s: Seconds from a failure until a replacement serves the same layers.
    retry: Whether a request whose attempt failed is sent again, at most MAX_ATTEMPTS times.
    within_plan: Refuse more sequences at a time, or longer ones, than the plan has memory for.
    seed: Seed of the times of random failures.
  Raises: ValueError: a number that makes no sense, a failure of a host that the plan does not use, or so
    many failures that nothing can be served.
  """
  if not isinstance(retry, bool):
    raise ValueError(f"retry = {retry!r}: True or False")
  if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
    raise ValueError(f"seed = {seed!r}: a whole number, 0 or more")
  if bad := [failure for failure in failures if not isinstance(failure, Failure)]:
    raise ValueError(f"failures: {bad[0]!r} is no Failure(host=..., at_s=...)")
  if within_plan:
    _check_memory(plan, min(requests, concurrency), prompt, answer)
  for name, value in (
    ("requests", requests),
    ("concurrency", concurrency),
    ("prompt", prompt),
    ("answer", answer),
  ):
    if value < 1:
      raise ValueError(f"{name} = {value}: it must be at least 1")
  if not 0 <= failures_per_hour <= MOST_FAILURES:
    raise ValueError(
      f"failures_per_hour = {failures_per_hour}: from 0 to {MOST_FAILURES:g} of each host"
    )
  if not 0 <= repair_s < math.inf:
    raise ValueError(f"repair_s = {repair_s}: 0 or more, and finite")
  longest = max(Counter(stage.pipeline for stage in plan.stages).values())
  events = requests * (answer + -(-prompt // plan.prefill_tokens)) * 2 * (longest + 1)
  if events > MOST_EVENTS:
    raise ValueError(
      f"{requests} requests of {prompt} + {answer} tokens through up to {longest} stages are {events:.2g} "
      f"events, and at most {MOST_EVENTS:.2g} are simulated: ask for fewer or shorter ones"
    )
  if concurrency < plan.batch and requests >= plan.batch:
    raise ValueError(
      f"concurrency = {concurrency}: the plan steps batches of {plan.batch}; have as many at once, or "
      "plan for a smaller batch"
    )
  hosts = sorted({stage.host for stage in plan.stages})
  for failure in failures:
    if failure.host not in hosts:
      raise ValueError(
        f"host {failure.host!r} fails, but the plan uses only {', '.join(hosts[:8])}"
      )
  run = _Run(plan, requests, concurrency, prompt, answer, retry, repair_s)
  draw = random.Random(seed)
  planned = sorted(failures, key=lambda failure: failure.at_s)
  rate = failures_per_hour / 3600
  # What is down cannot fail: of each host the next time, drawn anew from when it is back.
  drawn = [(draw.expovariate(rate), host) for host in hosts] if rate else []
  heapq.heapify(drawn)
  run.start(0.0)
  while run.heap:
    next_s = run.heap[0][0]
    planned_s = planned[0].at_s if planned else math.inf
    drawn_s = drawn[0][0] if drawn else math.inf
    if min(planned_s, drawn_s) <= next_s:
      if planned_s <= drawn_s:
        failure = planned.pop(0)
        run.fail(failure.host, failure.at_s)
        continue
      host = drawn[0][1]
      if run.down_until_s.get(host, 0.0) <= drawn_s:
        run.fail(host, drawn_s)
      heapq.heapreplace(drawn, (run.down_until_s[host] + draw.expovariate(rate), host))
      continue
    run.step()
  return run.result()


class _Run:
  def __init__(
    self,
    plan: Plan,
    requests: int,
    concurrency: int,
    prompt: int,
    answer: int,
    retry: bool,
    repair_s: float,
  ):
    self.plan, self.prompt, self.answer = plan, prompt, answer
    self.retry, self.repair_s = retry, repair_s
    self.requests, self.waiting_new = requests, requests
    self.most_groups = max(1, concurrency // plan.batch)
    self.heap: list[tuple[float, int, int, _Group, int, int, int]] = []
    self.count = 0
    self.pipelines: list[_Pipeline] = []
    self.devices = {stage.label: _Server(stage.label) for stage in plan.stages}
    self.links: dict[tuple[str, str], _Server] = {}
    for hop in plan.hops:
      name = f"{hop.a or 'coordinator'} - {hop.b or 'coordinator'}"
      self.links.setdefault((hop.a, hop.b), _Server(name))
    self.stage_of = {stage.label: stage for stage in plan.stages}
    self.down_until_s: dict[str, float] = {}
    for number in range(plan.pipelines):
      stages = [stage for stage in plan.stages if stage.pipeline == number]
      hops = [hop for hop in plan.hops if hop.pipeline == number]
      onward: dict[str, list[Hop]] = {}
      for hop in hops:
        onward.setdefault(hop.a, []).append(hop)
      pipeline = _Pipeline(stages, onward)
      if all(stage.share == 1 for stage in stages):
        pipeline.way = self._way(stages, hops)
      self.pipelines.append(pipeline)
    self.again: deque[_Group] = deque()
    self.under_way = 0
    self.token_times: list[float] = []
    self.firsts: list[float] = []
    self.gaps: list[float] = []
    self.whole: list[float] = []
    self.tokens = self.failed = self.restarts = self.failures = self.lost_tokens = self.events = 0
    self.in_vain = 0
    self.now_s = 0.0

  # Positions in the way of a pass of K stages: 2k is hop k, 2k + 1 is stage k, 2K + 1 is the coordinator.

  def _way(self, stages: list[Stage], hops: list[Hop]) -> _Way:
    return _Way(
      stages,
      hops,
      [self.devices[stage.label] for stage in stages],
      [self.links[hop.a, hop.b] for hop in hops],
    )

  def _is_up(self, stage: Stage, now_s: float) -> bool:
    return self.down_until_s.get(stage.host, 0.0) <= now_s

  def _choose(self, pipeline: _Pipeline, now_s: float) -> _Way | None:
    """The way that is due by the shares, of those that are whole; None if none is."""
    if pipeline.way is not None:
      up = all(self._is_up(stage, now_s) for stage in pipeline.stages)
      return pipeline.way if up else None
    # Whole is, from the end on, what is up and goes on to something whole.
    whole = {""}
    for stage in sorted(pipeline.stages, key=lambda stage: -stage.first_layer):
      if self._is_up(stage, now_s) and any(h.b in whole for h in pipeline.onward[stage.label]):
        whole.add(stage.label)
    hops: list[Hop] = []
    at = ""
    while not hops or at:
      possible = [hop for hop in pipeline.onward[at] if hop.b in whole]
      if not possible:
        return None
      taken = pipeline.taken
      hop = min(possible, key=lambda hop: (taken.get((hop.a, hop.b), 0) + 1) / hop.share)
      hops.append(hop)
      at = hop.b
    for hop in hops:
      pipeline.taken[hop.a, hop.b] = pipeline.taken.get((hop.a, hop.b), 0) + 1
    return self._way([self.stage_of[hop.b] for hop in hops[:-1]], hops)

  def start(self, now_s: float) -> None:
    """Begin what there is room for, on the pipeline with fewest sequences that is whole."""
    while self.under_way < self.most_groups and (self.again or self.waiting_new):
      way = None
      for pipeline in sorted(self.pipelines, key=lambda p: len(p.active)):
        way = self._choose(pipeline, now_s)
        if way is not None:
          break
      if way is None:
        return
      if self.again:
        group = self.again.popleft()
      else:
        size = min(self.plan.batch, self.waiting_new)
        self.waiting_new -= size
        group = _Group(size, now_s)
      group.pipeline, group.way = pipeline, way
      group.start_s, group.answered, group.work = now_s, 0, 0
      group.firsts, group.gaps, group.times = [], [], []
      pipeline.active.add(group)
      self.under_way += 1
      self.in_vain = 0
      chunk = self.plan.prefill_tokens
      group.prefilling = group.size
      for _ in range(group.size):
        for first in range(0, self.prompt, chunk):
          tokens = min(chunk, self.prompt - first)
          is_last = first + tokens == self.prompt
          # Negative: a part of the prompt from which no token is drawn.
          self._push(now_s, group, 0, tokens, 1 if is_last else -1)

  def step(self) -> None:
    now_s, _, epoch, group, position, tokens, kind = heapq.heappop(self.heap)
    self.events += 1
    if position < 0:
      self.start(now_s)
      return
    if epoch != group.epoch:
      return
    self.now_s = now_s
    way = group.way
    assert way is not None
    index, is_stage = position >> 1, position & 1
    if is_stage and index < len(way.stages):
      stage = way.stages[index]
      done_s = way.devices[index].take(now_s, self._stage_s(stage, tokens, kind))
      # What was computed counts once it is done, which is when it reaches the next link.
      self._push(done_s, group, position + 1, tokens, kind)
      return
    if is_stage:
      self._back(group, now_s, kind)
      return
    if index:
      done = tokens if kind else group.size
      way.devices[index - 1].tokens += done
      group.work += done
    if kind < 0 and index == len(way.stages):
      return
    hop, link = way.hops[index], way.links[index]
    if kind:
      whole = self.plan.prefill_tokens
      transfer_s = hop.prefill_s if tokens == whole else hop.prefill_s * tokens / whole
    else:
      transfer_s = hop.transfer_s
    link.tokens += tokens if kind else group.size
    self._push(link.take(now_s, transfer_s) + hop.latency_s, group, position + 1, tokens, kind)

  def _stage_s(self, stage: Stage, tokens: int, kind: int) -> float:
    if not kind:
      return stage.step_s
    chunk = self.plan.prefill_tokens
    if tokens == chunk:
      return stage.prefill_s
    # The true time is convex in the tokens (it is a maximum of lines): this is no less.
    least_s = min(stage.step_s, stage.prefill_s)
    return least_s + (stage.prefill_s - least_s) * (tokens - 1) / max(1, chunk - 1)

  def _back(self, group: _Group, now_s: float, kind: int) -> None:
    """One token of each sequence, or the first of one, is with the coordinator."""
    pipeline = group.pipeline
    assert pipeline is not None
    if kind:
      group.firsts.append(now_s - group.start_s)
      group.times.append(now_s)
      group.prefilling -= 1
      if group.prefilling:
        return
      group.answered = 1
    else:
      group.gaps.append(now_s - group.last_s)
      group.times += [now_s] * group.size
      group.answered += 1
    group.last_s = now_s
    if group.answered < self.answer:
      self._push(now_s, group, 0, 1, 0)
      return
    pipeline.active.discard(group)
    self.under_way -= 1
    self.tokens += group.size * self.answer
    self.whole += [now_s - group.begun_s] * group.size
    self.firsts += group.firsts
    self.gaps += group.gaps
    self.token_times += group.times
    self.start(now_s)

  def fail(self, host: str, at_s: float) -> None:
    self.failures, self.now_s = self.failures + 1, at_s
    self.in_vain = 0 if self.under_way else self.in_vain + 1
    if self.in_vain > MOST_IN_VAIN:
      raise ValueError(
        f"{MOST_IN_VAIN:,} failures in a row left no pipeline whole: fewer failures per hour, a shorter "
        "repair, or a plan over fewer hosts"
      )
    back_s = at_s + self.repair_s
    self.down_until_s[host] = max(self.down_until_s.get(host, 0.0), back_s)
    for pipeline in self.pipelines:
      if all(stage.host != host for stage in pipeline.stages):
        continue
      hit = [g for g in pipeline.active if g.way and any(s.host == host for s in g.way.stages)]
      if pipeline.way is not None:
        servers = [*pipeline.way.devices, *pipeline.way.links]
      else:
        # What is under way for others stays; of the rest only what waits on the host itself is forgotten.
        inside = {stage.label for stage in pipeline.stages if stage.host == host}
        servers = [self.devices[label] for label in inside]
        servers += [link for ends, link in self.links.items() if inside & set(ends)]
      for server in dict.fromkeys(servers):
        server.drop(at_s, at_s)
      for group in sorted(hit, key=lambda group: (group.begun_s, group.start_s)):
        group.epoch += 1
        self.under_way -= 1
        self.restarts += 1
        self.lost_tokens += group.work
        pipeline.active.discard(group)
        if self.retry and group.epoch < MAX_ATTEMPTS:
          self.again.append(group)
        else:
          self.failed += group.size
    if self.again or self.waiting_new:
      nobody = _Group(0, at_s)
      # Who can go on elsewhere does so at once, the others when the host is back.
      self._push(at_s, nobody, -1, 0, 0)
      self._push(back_s, nobody, -1, 0, 0)

  def _push(self, at_s: float, group: _Group, position: int, tokens: int, kind: int) -> None:
    self.count += 1
    heapq.heappush(self.heap, (at_s, self.count, group.epoch, group, position, tokens, kind))

  def result(self) -> Result:
    duration_s = self.now_s
    times = sorted(self.token_times)
    low, high = len(times) // 5, len(times) - 1 - len(times) // 5
    span_s = times[high] - times[low] if times else 0.0
    rate = self.tokens / duration_s if duration_s else 0.0
    return Result(
      duration_s=duration_s,
      requests=self.requests,
      tokens=self.tokens,
      tokens_per_s=rate,
      steady_tokens_per_s=(high - low) / span_s if span_s > 0 else rate,
      first_token_s=_spread(self.firsts),
      token_s=_spread(self.gaps),
      request_s=_spread(self.whole),
      stages=tuple(_use(server, duration_s) for server in self.devices.values()),
      links=tuple(_use(server, duration_s) for server in self.links.values()),
      failures=self.failures,
      restarts=self.restarts,
      failed=self.failed,
      lost_tokens=self.lost_tokens,
      events=self.events,
    )


def _check_memory(plan: Plan, together: int, prompt: int, answer: int) -> None:
  """Raises: ValueError: more at a time, or longer, than memory was planned for."""
  room = None if plan.sequences is None else plan.sequences * plan.pipelines
  if room is not None and together > room:
    raise ValueError(
      f"concurrency = {together}: the plan has memory for the caches of {counted(room, 'sequence')}: serve "
      "fewer at a time, or plan for more sequences (--sequences)"
    )
  if prompt + answer > plan.context:
    raise ValueError(
      f"prompt = {prompt} and answer = {answer}: the plan is for {plan.context} positions: shorten them, or "
      "plan for a longer context (--context)"
    )


def _use(server: _Server, duration_s: float) -> Use:
  return Use(
    name=server.name,
    busy=server.busy_s / duration_s if duration_s else 0.0,
    tokens=server.tokens,
  )


def _spread(values: list[float]) -> Spread:
  """By nearest rank."""
  ordered = sorted(values)

  def at(fraction: float) -> float | None:
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else None

  return Spread(p50_s=at(0.5), p95_s=at(0.95), p99_s=at(0.99), max_s=at(1.0))

"""The sequences that are open on a stage server, and their steps."""

import asyncio
import contextlib
import dataclasses
import logging
import time

from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline.device import DeviceThread
from neurojax.pipeline.loading import Loaded, Loader
from neurojax.pipeline.onward import Lost, NextLink, Outlet
from neurojax.wire import tensor
from neurojax.wire.identity import printable

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Sequence:
  """An open sequence.

  Attributes:
    owner: The way back to the coordinator that opened it.
    next: The link to the next stage; None on the last.
    steps: Number of steps that came.
  """

  owner: Outlet
  next: NextLink | None
  steps: int = 0


class Sequences:
  """Opens, steps and closes sequences on the layers that the loader holds.

  Args:
    name: Name of the server, by which peers know it.
    limit: Bytes of the largest frame on a link to a next stage.
  """

  def __init__(self, loader: Loader, thread: DeviceThread, *, name: str, limit: int):
    self._loader, self._thread, self._name, self._limit = loader, thread, name, limit
    self._sequences: dict[str, _Sequence] = {}
    self._next_links: dict[str, NextLink] = {}
    self._connecting = asyncio.Lock()

  def __len__(self) -> int:
    return len(self._sequences)

  async def open(self, message: pb.Open, outlet: Outlet, owned: set[str]) -> None:
    """Make room for a sequence and tell its owner, or tell it why not.

    Args:
      outlet: The way back to the owner.
      owned: Names of the owner's sequences; kept up to date.
    """
    name = message.sequence
    try:
      if not 1 <= len(name) <= 64:
        raise ValueError(f"a sequence name of {len(name)} characters: 1 to 64")
      if name in self._sequences:
        raise ValueError(f"sequence {name!r} is open already")
      loaded = self._require_loaded()
      if loaded.span.is_last == bool(message.next_address):
        raise ValueError("a next address belongs to every stage but the last")
      self._sequences[name] = record = _Sequence(outlet, None)
      owned.add(name)
      if message.next_address:
        record.next = await self._next_link(message, loaded)
      request = messages.sampling_request(message.sampling)
      await self._thread.do(lambda: loaded.runtime.open(name, request))
      if name not in self._sequences:
        await self._thread.do(lambda: loaded.runtime.close(name))
        return
      await outlet.send(pb.Frame(opened=pb.Opened(sequence=name)))
    except Exception as error:
      if name in owned:
        owned.discard(name)
        await self.close(name)
      await outlet.send(self._failure(name, error))

  async def step(
    self, message: pb.Step, sender: pb.Hello, outlet: Outlet, received_s: float
  ) -> None:
    """Compute a step, hand it on, and tell the owner of the sequence.

    Args:
      outlet: The way back to the sender, who need not be the owner.
      received_s: When the step arrived.
    """
    name = message.sequence
    record = self._sequences.get(name)
    if record is None:
      # Steps already on their way when a sequence is closed end here.
      await outlet.send(self._failure(name[:64], ValueError("the sequence is not open here")))
      return
    try:
      if message.index != record.steps:
        raise ValueError(f"step {message.index} came where step {record.steps} was due")
      record.steps += 1
      loaded = self._require_loaded()
      if sender.has_layers == loaded.span.is_first:
        raise ValueError(
          f"{printable(sender.name, 80)} has no steps to send to layers {loaded.span}"
        )
      given = messages.step_input(message)
      output = await self._thread.do(lambda: loaded.runtime.step(name, given))
      finished_s = time.time()
      if record.next:
        onward = dataclasses.replace(given, hidden=output.hidden)
        await record.next.send(pb.Frame(step=messages.step(name, message.index, onward)))
      outcome = pb.Outcome(
        sequence=name,
        index=message.index,
        received_s=received_s,
        finished_s=finished_s,
        compute_s=output.compute_s,
      )
      if output.token is not None:
        outcome.sampled, outcome.token, outcome.logprob = True, output.token, output.logprob
      if output.scores is not None:
        outcome.scores.CopyFrom(tensor.encode(output.scores))
      await record.owner.send(pb.Frame(outcome=outcome))
    except Exception as error:
      await self._fail(name, error)

  async def close(self, name: str) -> None:
    """Free a sequence; one that is not open is no error."""
    self._sequences.pop(name, None)
    loaded = self._loader.loaded
    if loaded:
      await self._thread.do(lambda: loaded.runtime.close(name))

  async def unlink(self) -> None:
    """Close the links to next stages, whose greetings told of layers that are held no more."""
    for link in self._next_links.values():
      await link.close()
    self._next_links.clear()

  async def _fail(self, name: str, error: Exception) -> None:
    """End a sequence and tell its owner why."""
    record = self._sequences.get(name)
    if record is None:
      return
    if not isinstance(error, ValueError | FloatingPointError | Lost):
      log.exception("step of sequence %s failed", printable(name), exc_info=error)
    await self.close(name)
    with contextlib.suppress(Exception):
      await record.owner.send(self._failure(name, error))

  def _failure(self, name: str, error: Exception) -> pb.Frame:
    kind = {ValueError: "invalid", FloatingPointError: "numeric", Lost: "lost"}.get(
      type(error), "internal"
    )
    text = str(error) if kind != "internal" else f"{type(error).__name__}: {error}"
    return pb.Frame(
      failure=pb.Failure(sequence=name, stage=self._name, kind=kind, message=text[:2000])
    )

  def _require_loaded(self) -> Loaded:
    if self._loader.loaded is None:
      raise ValueError("no layers are loaded here")
    return self._loader.loaded

  async def _next_link(self, message: pb.Open, loaded: Loaded) -> NextLink:
    async with self._connecting:
      link = self._next_links.get(message.next_address)
      if link and not link.lost:
        return link
      hello = loaded.hello(self._name)
      hello.your_first_layer = message.next_first_layer
      hello.your_last_layer = message.next_last_layer
      link = await NextLink.connect(
        message.next_address, hello, limit=self._limit, on_lost=self._on_next_lost
      )
      self._next_links[message.next_address] = link
      return link

  async def _on_next_lost(self, link: NextLink) -> None:
    assert link.lost is not None
    for name in [name for name, record in self._sequences.items() if record.next is link]:
      await self._fail(name, Lost(link.lost))

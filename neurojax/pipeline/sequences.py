"""The sequences that are open on a stage server, and their steps."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import rows as wire
from neurojax.pipeline.device import DeviceThread
from neurojax.pipeline.loading import Loaded, Loader
from neurojax.pipeline.onward import Lost, NextLink, Outlet
from neurojax.pipeline.places import Places
from neurojax.stage.step import Row, RowOutput
from neurojax.wire.identity import printable

log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Sequence:
  """An open sequence.

  Attributes:
    name: By which its coordinator and the other stages know it.
    slot: Where it lies here.
    owner: The way back to the coordinator that opened it.
    next: The link to the next stage; None on the last.
    steps: Number of steps that came.
  """

  name: str
  slot: int
  owner: Outlet
  next: NextLink | None = None
  steps: int = 0


@dataclasses.dataclass(frozen=True)
class _Part:
  """A row of a step and its output, or None before it is computed."""

  sequence: _Sequence
  index: int
  row: Row
  output: RowOutput = RowOutput()


class Sequences:
  """Opens, steps and closes sequences on the layers that the loader holds.

  Args:
    name: Name of the server, by which peers know it.
    limit: Bytes of the largest frame on a link to a next stage.

  Attributes:
    places: Whose the places for kept blocks are.
  """

  def __init__(self, loader: Loader, thread: DeviceThread, *, name: str, limit: int):
    self._loader, self._thread, self._name, self._limit = loader, thread, name, limit
    self._sequences: dict[str, _Sequence] = {}
    # Slots of open sequences, and of those whose slot is just being freed.
    self._taken: set[int] = set()
    self._freeing: set[asyncio.Future[None]] = set()
    self._next_links: dict[str, NextLink] = {}
    self._connecting = asyncio.Lock()
    self.places = Places()

  def __len__(self) -> int:
    return len(self._sequences)

  # ---- opening and closing

  async def open(self, message: pb.Open, outlet: Outlet) -> None:
    """Make room for a sequence and tell its owner, or tell it why not.

    Args:
      outlet: The way back to the owner.
    """
    name, sequence = message.sequence, None
    try:
      if not 1 <= len(name) <= 64:
        raise ValueError(f"a sequence name of {len(name)} characters: 1 to 64")
      if name in self._sequences:
        raise ValueError(f"sequence {name!r} is open already")
      loaded = self._require_loaded()
      if loaded.span.is_last == bool(message.next_address):
        raise ValueError("a next address belongs to every stage but the last")
      sequence = _Sequence(name, self._free_slot(loaded), outlet)
      self._sequences[name] = sequence
      self._taken.add(sequence.slot)
      if message.next_address:
        sequence.next = await self._next_link(message, loaded)
      begin = self._begin(sequence, message, loaded)
      if self._is_open(sequence):
        await self._thread.do(begin)
      if self._is_open(sequence):
        await outlet.send(pb.Frame(opened=pb.Opened(sequence=name)))
    except Exception as error:
      if sequence is not None:
        await self._release(sequence)
      await outlet.send(self._failure(name[:64], error))

  def _free_slot(self, loaded: Loaded) -> int:
    slots = loaded.runtime.stage.slots
    free = next((slot for slot in range(slots) if slot not in self._taken), None)
    if free is None:
      raise ValueError(f"all {slots} sequence places are taken")
    return free

  def _begin(self, sequence: _Sequence, message: pb.Open, loaded: Loaded) -> Callable[[], None]:
    """Check what a sequence begins with. Returns: What the device has to do."""
    sampling = messages.sampling_request(message.sampling)
    copy = None
    if message.copy_sequence:
      source = self._sequences.get(message.copy_sequence)
      if source is None or source.owner is not sequence.owner or source is sequence:
        raise ValueError("the sequence to copy is not open here")
      copy = source.slot, message.copy_positions
    restore = tuple(message.restore)
    self.places.check_restore(sequence.owner, restore)
    stop_ids = frozenset(message.stop_ids)
    return lambda: loaded.runtime.open(
      sequence.slot, sampling, stop_ids=stop_ids, restore=restore, copy=copy
    )

  async def close(self, name: str, outlet: Outlet) -> None:
    """Free a sequence of a link's own; one that is not open is no error."""
    sequence = self._sequences.get(name)
    if sequence is not None and sequence.owner is outlet:
      await self._release(sequence)

  async def leave(self, outlet: Outlet) -> None:
    """Free all that a link has, which has ended."""
    self.places.leave(outlet)
    for sequence in [s for s in self._sequences.values() if s.owner is outlet]:
      await self._release(sequence)

  async def unlink(self) -> None:
    """Close the links to next stages, whose greetings told of layers that are held no more."""
    self.places.clear()
    for link in self._next_links.values():
      await link.close()
    self._next_links.clear()

  def _is_open(self, sequence: _Sequence) -> bool:
    return self._sequences.get(sequence.name) is sequence

  async def _release(self, sequence: _Sequence) -> None:
    """Free the slot of a sequence, once, after what the device has to do before.

    It is freed to the end, even if the link whose end is the reason for it cancels whoever waits.
    """
    if not self._is_open(sequence):
      return
    del self._sequences[sequence.name]
    freeing = asyncio.ensure_future(self._free(sequence.slot))
    self._freeing.add(freeing)
    freeing.add_done_callback(self._freeing.discard)
    await asyncio.shield(freeing)

  async def _free(self, slot: int) -> None:
    loaded = self._loader.loaded
    if loaded:
      await self._thread.do(lambda: loaded.runtime.close(slot))
    self._taken.discard(slot)

  # ---- steps

  async def step(
    self, message: pb.Step, sender: pb.Hello, outlet: Outlet, received_s: float
  ) -> None:
    """Compute a step, hand it on, and tell the owners of its sequences.

    A row that does not fit, or fails, ends its own sequence only.

    Args:
      outlet: The way back to the sender, who need not be an owner.
      received_s: When the step arrived.
    Raises: ValueError: the step has more rows than there are slots; it would be answered row by row.
    """
    loaded = self._require_loaded()
    if len(message.rows) > loaded.runtime.stage.slots:
      raise ValueError(
        f"a step of {len(message.rows)} rows: {loaded.runtime.stage.slots} sequences have room here"
      )
    parts = await self._parts(message, sender, outlet, loaded)
    for part in parts:
      self.places.writing(part.row.keep)
    if not parts:
      return
    try:
      rows = [part.row for part in parts]
      outputs = await self._thread.do(lambda: loaded.runtime.step(rows))
    except Exception as error:
      for part in parts:
        await self._fail(part.sequence, error)
      return
    finished_s = time.time()
    done = [
      dataclasses.replace(part, output=output) for part, output in zip(parts, outputs, strict=True)
    ]
    for part in await self._going(done):
      self.places.written(part.sequence.owner, part.row.keep)
    await self._hand_on(done)
    await self._tell(done, received_s, finished_s)

  async def _parts(
    self, message: pb.Step, sender: pb.Hello, outlet: Outlet, loaded: Loaded
  ) -> list[_Part]:
    """The rows of a step that fit; the others are refused."""
    parts: dict[_Sequence, _Part] = {}
    for row in message.rows:
      sequence = self._sequences.get(row.sequence)
      if sequence is None or not (sender.has_layers or sequence.owner is outlet):
        # Steps already on their way when a sequence is closed end here.
        await outlet.send(
          self._failure(row.sequence[:64], ValueError("the sequence is not open here"))
        )
        continue
      try:
        if sequence in parts:
          del parts[sequence]
          raise ValueError("two rows of the sequence in one step")
        if row.index != sequence.steps:
          raise ValueError(f"step {row.index} came where step {sequence.steps} was due")
        if sender.has_layers == loaded.span.is_first:
          raise ValueError(
            f"{printable(sender.name, 80)} has no steps to send to layers {loaded.span}"
          )
        self.places.check_granted(sequence.owner, row.keep)
        parts[sequence] = _Part(sequence, row.index, wire.read_row(row, sequence.slot))
        sequence.steps += 1
      except Exception as error:
        await self._fail(sequence, error)
    return [part for part in parts.values() if self._is_open(part.sequence)]

  async def _going(self, parts: Sequence[_Part]) -> list[_Part]:
    """Ends the sequences whose rows failed, and tells their owners. Returns: The parts that go on."""
    for part in parts:
      if part.output.error is not None:
        await self._fail(part.sequence, part.output.error)
    return [part for part in parts if self._is_open(part.sequence)]

  async def _hand_on(self, parts: Sequence[_Part]) -> None:
    for link in {part.sequence.next for part in parts} - {None}:
      going = [p for p in parts if p.sequence.next is link and self._is_open(p.sequence)]
      rows = [
        wire.row(p.sequence.name, p.index, dataclasses.replace(p.row, hidden=p.output.hidden))
        for p in going
      ]
      try:
        for step in wire.steps(rows):
          await link.send(pb.Frame(step=step))
      except Exception as error:
        for part in going:
          await self._fail(part.sequence, error)

  async def _tell(self, parts: Sequence[_Part], received_s: float, finished_s: float) -> None:
    for owner in {part.sequence.owner for part in parts}:
      going = [p for p in parts if p.sequence.owner is owner and self._is_open(p.sequence)]
      if not going:
        continue
      outcome = pb.Outcome(
        rows=[wire.outcome(p.sequence.name, p.index, p.output) for p in going],
        received_s=received_s,
        finished_s=finished_s,
        compute_s=going[0].output.compute_s,
      )
      try:
        await owner.send(pb.Frame(outcome=outcome))
      except Exception as error:
        for part in going:
          await self._fail(part.sequence, error)

  async def _fail(self, sequence: _Sequence, error: Exception) -> None:
    """End a sequence and tell its owner why."""
    if not self._is_open(sequence):
      return
    if not isinstance(error, ValueError | FloatingPointError | Lost):
      log.exception("step of sequence %s failed", printable(sequence.name), exc_info=error)
    await self._release(sequence)
    with contextlib.suppress(Exception):
      await sequence.owner.send(self._failure(sequence.name, error))

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

  # ---- links to next stages

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
    for sequence in [s for s in self._sequences.values() if s.next is link]:
      await self._fail(sequence, Lost(link.lost))

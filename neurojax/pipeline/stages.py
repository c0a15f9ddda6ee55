"""The stage servers of one pipeline, from the first meeting to the close."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from neurojax.config import ModelConfig, Span
from neurojax.count.serving import Load
from neurojax.count.working import kind_of
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline.contact import Contact, PipelineOptions
from neurojax.pipeline.errors import HandshakeError
from neurojax.plan.fleet import Fleet
from neurojax.plan.plan import Placement
from neurojax.plan.proportional import as_planned, proportional

log = logging.getLogger(__name__)


class Stages:
  """The contacts of a pipeline in the order of the layers.

  `meet`, `load` and `link` set it up, in this order. `relink` replaces contacts that were lost.

  Attributes:
    placements: The span of each stage, with the bytes that it takes and the host has free.
    block: Positions of a kept block, and the grid on which prompts are cut; 0 before `link`.
  """

  def __init__(self, config: ModelConfig, identity: pb.Identity, options: PipelineOptions):
    self._config, self.identity, self._options = config, identity, options
    self._contacts: list[Contact] = []
    self._relinking = asyncio.Lock()
    self.placements: tuple[Placement, ...] = ()
    self.block = 0

  def __len__(self) -> int:
    return len(self._contacts)

  def __iter__(self) -> Iterator[Contact]:
    return iter(self._contacts)

  def __getitem__(self, index: int) -> Contact:
    return self._contacts[index]

  def index(self, contact: Contact) -> int:
    return self._contacts.index(contact)

  @property
  def places(self) -> int:
    """Places for kept blocks that every stage grants."""
    return min((contact.places for contact in self), default=0)

  async def meet(self, fleet: Fleet, planned: Mapping[str, Span] | None) -> None:
    """Meet every host and decide which layers each is to hold.

    Args:
      planned: Spans by address; in proportion to free memory if None.
    Raises: as `Contact.meet` does; ValueError: hosts have too little memory.
    """
    meetings = (
      Contact.meet(host, self._config, self.identity, self._options) for host in fleet.hosts
    )
    met = await asyncio.gather(*meetings, return_exceptions=True)
    contacts = [contact for contact in met if isinstance(contact, Contact)]
    failed = [error for error in met if isinstance(error, BaseException)]
    try:
      if failed:
        raise failed[0]
      self.placements = self._placed(contacts, planned)
    except BaseException:
      for contact in contacts:
        await contact.close()
      raise
    spans = {placement.host: placement.span for placement in self.placements}
    for contact in contacts:
      if contact.host.address in spans:
        contact.span = spans[contact.host.address]
        self._contacts.append(contact)
      else:
        log.warning("%s is left out: the plan gives it no layer", contact.host.address)
        await contact.close()

  def _placed(
    self, met: Sequence[Contact], planned: Mapping[str, Span] | None
  ) -> tuple[Placement, ...]:
    free = {
      contact.host.address: min(
        contact.host.memory_bytes or 1 << 62, contact.description.memory_bytes
      )
      for contact in met
    }
    load = Load(serving=self._options.serving, forms=self._options.forms)
    kinds = {contact.host.address: kind_of(contact.description.device) for contact in met}
    if planned is None:
      return proportional(self._config, list(free.items()), load, list(kinds.values()))
    return as_planned(self._config, planned, free, load, kinds)

  async def load(self) -> None:
    """Have every stage load its span, and all run by the same programs.

    Fused programs and the model's own hand on activations of different dtypes, so one stage that
    cannot run fused programs keeps all from it.
    """
    await asyncio.gather(*(contact.load() for contact in self))
    kinds = {contact.label: contact.description.identity.programs for contact in self}
    # All contacts share this message: what is loaded again later has to become the same.
    self.identity.programs = "fused" if set(kinds.values()) == {"fused"} else "model"
    fused = [contact for contact in self if kinds[contact.label] != self.identity.programs]
    if fused:
      log.warning(
        "not every stage can run the fused programs, so none does: %s; ask for 'model' to have these"
        " loaded only once",
        ", ".join(f"{label}: {kind}" for label, kind in kinds.items()),
      )
      await asyncio.gather(*(contact.load() for contact in fused))

  async def link(
    self, on_frame: Callable[[Contact, pb.Frame], None], on_lost: Callable[[Contact], None]
  ) -> None:
    """Open the link to every stage. Arguments and errors are those of `Contact.link`."""
    self._on_frame, self._on_lost = on_frame, on_lost
    await asyncio.gather(*(contact.link(on_frame, on_lost) for contact in self))
    self.block = self[0].block
    for contact in self:
      self._check_block(contact)

  def _check_block(self, contact: Contact) -> None:
    if contact.block != self.block:
      raise HandshakeError(
        contact.label, f"its blocks have {contact.block} positions, those of others {self.block}"
      )

  async def relink(self) -> None:
    """Meet every lost stage again; a server that was started anew loads its span again."""
    async with self._relinking:
      for index, contact in enumerate(self._contacts):
        if contact.lost is None:
          continue
        await contact.close()
        fresh = await Contact.meet(contact.host, self._config, self.identity, self._options)
        fresh.span, fresh.timing = contact.span, contact.timing
        self._contacts[index] = fresh
        await fresh.load()
        await fresh.link(self._on_frame, self._on_lost)
        self._check_block(fresh)

  async def close(self) -> None:
    for contact in self._contacts:
      await contact.close()
    self._contacts.clear()

"""Errors that cross the wire. Each names the host and the layers it is about."""

from neurojax.engine.api import EngineError


class PipelineError(EngineError):
  """A stage failed a request.

  Attributes:
    stage: What the stage calls itself and its address.
  """

  def __init__(self, stage: str, message: str):
    super().__init__(f"stage {stage}: {message}")
    self.stage = stage


class HandshakeError(PipelineError):
  """Two ends do not agree on protocol, package, model or layers."""


class StageLost(PipelineError):
  """The connection to a stage is gone: it died, or the network did."""


class StageTimeout(PipelineError):
  """A stage did not finish its step in time."""


class StageFailed(PipelineError):
  """A stage refused or failed a step and said why."""


class ProtocolError(StageFailed):
  """A stage sent what the protocol does not allow at this point."""

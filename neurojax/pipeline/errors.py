"""Errors of stage servers and the links to them. Each names the host and the layers."""

from neurojax.engine.api import EngineError


class PipelineError(EngineError):
  """A stage failed a request.

  Attributes:
    stage: Name and address of the stage, with its layers once they are known.
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

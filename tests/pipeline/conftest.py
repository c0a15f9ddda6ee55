from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.servers import Cluster, cluster


@pytest.fixture(scope="module")
def three(tiny_path: Path) -> Iterator[Cluster]:
  """Three real servers, shared by the tests of a module: what one test leaves must serve the next."""
  with cluster(tiny_path, 3) as servers:
    yield servers

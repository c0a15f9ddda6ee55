"""The model that the package carries: its tensors are those that its numbers were measured with."""

import hashlib

from neurojax.files.find import PACKAGED
from neurojax.files.gguf.file import GgufFile

TENSORS = "bd9930077a5684feebb22f0ebdfff23a6a231651f36fce09a63882d0c2291767"


def test_the_packaged_tensors_are_the_measured_ones():
  with GgufFile(PACKAGED) as file:
    found = []
    for name, info in sorted(file.tensors.items()):
      with file.tensor_bytes(name) as raw:
        found.append((name, (info.type, info.shape, hashlib.sha256(raw.tobytes()).hexdigest())))
    assert hashlib.sha256(repr(found).encode()).hexdigest() == TENSORS
    assert file.problems() == []


def test_the_packaged_file_says_what_it_was_trained_for():
  with GgufFile(PACKAGED) as file:
    assert file.activations == "int8"
    assert file.card["general.license"] == "Apache-2.0"

"""Names of models on the hub: org/name[@revision][:file], and short names for some."""

import dataclasses
import re
from typing import Self

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_ADDRESS = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^@:]+))?(?::(?P<file>.+))?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]*")
_HOST = re.compile(r"hf://|(?:https?://)?(?:huggingface\.co|hf\.co)/")
# What follows the host in the address of a page or of a file.
_PAGE = re.compile(
  r"(?P<repo>[^/]+/[^/:@?#]+)/(?:blob|resolve|tree|raw)/(?P<revision>[^/?#]+)"
  r"(?:/(?P<file>[^?#]+))?(?:[?#].*)?"
)
_FILE_ENDS = (".gguf", ".bin", ".safetensors", ".json", ".toml")

ALIASES = {
  # The names by which NeuroGrid downloads, and what it serves them from.
  "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
  "llama-7b": "meta-llama/Llama-2-7b-hf",
  "llama-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
  "llama-13b": "meta-llama/Llama-2-13b-hf",
  "llama-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
  "mistral-7b": "mistralai/Mistral-7B-v0.3",
  "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
  "mistral-nemo": "mistralai/Mistral-Nemo-Instruct-2407",
  "lfm2-1.2b-thinking": "LiquidAI/LFM2.5-1.2B-Thinking",
  # The other models of its table.
  "bonsai-1.7b": "prism-ml/Ternary-Bonsai-1.7B-gguf:Q2_0",
  "bonsai-4b": "prism-ml/Ternary-Bonsai-4B-gguf:Q2_0",
  "bonsai-8b": "prism-ml/Ternary-Bonsai-8B-gguf:Q2_0",
  "qwen3-8b": "Qwen/Qwen3-8B",
  "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
  "qwen2.5-7b-awq": "Qwen/Qwen2.5-7B-Instruct-AWQ",
  "gemma-4-31b": "google/gemma-4-31B-it",
  "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
  "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
  # Ternary models of others.
  "bitnet-2b": "microsoft/bitnet-b1.58-2B-4T",
  "falcon3-7b-1.58": "tiiuae/Falcon3-7B-Instruct-1.58bit",
  "llama3-8b-1.58": "HF1BitLLM/Llama3-8B-1.58-100B-tokens",
}
"""Short names. Case, hyphens and underscores do not matter: "llama7b" is "llama-7b"."""

_OTHER_SPELLINGS = {"llama2-7b": "llama-7b", "llama2-7b-chat": "llama-7b-chat"} | {
  "llama2-13b": "llama-13b", "llama2-13b-chat": "llama-13b-chat", "lfm2.5-1.2b-thinking": "lfm2-1.2b-thinking",
}  # fmt: skip


def _bare(name: str) -> str:
  return name.lower().replace("-", "").replace("_", "")


_BY_BARE_NAME = {_bare(name): target for name, target in ALIASES.items()} | {
  _bare(name): ALIASES[alias] for name, alias in _OTHER_SPELLINGS.items()
}


@dataclasses.dataclass(frozen=True)
class Address:
  """A model on the hub.

  Attributes:
    repo: "org/name".
    revision: A branch, a tag or a commit.
    file: A file's name, a quantization ("Q4_K_M"), "safetensors", or None for what there is.
  """

  repo: str
  revision: str = "main"
  file: str | None = None

  def __str__(self) -> str:
    at = "" if self.revision == "main" else f"@{self.revision}"
    text = f"{self.repo}{at}" + ("" if self.file is None else f":{self.file}")
    # Else it would be taken for a path.
    return f"hf.co/{text}" if text.lower().endswith(_FILE_ENDS) and self.file is None else text

  @classmethod
  def parse(cls, text: str) -> Self | None:
    """The model that `text` names; None if it can only be a path.

    Takes org/name[@revision][:file], an alias, with [@revision] and [:file] too, either after
    "hf.co/", and the address of a page of huggingface.co.

    Raises: ValueError: the revision or the file cannot be one.
    """
    host = _HOST.match(text)
    if host is not None:
      text = text[host.end() :]
      page = _PAGE.fullmatch(text)
      if page is not None:
        return cls._checked(page["repo"], page["revision"], page["file"])
    name, colon, file = text.partition(":")
    name, at, revision = name.partition("@")
    alias = _BY_BARE_NAME.get(_bare(name))
    if alias is not None:
      target = cls.parse(alias)
      assert target is not None
      return cls._checked(
        target.repo, revision if at else target.revision, file if colon else target.file
      )
    match = _ADDRESS.fullmatch(text)
    if match is None or (
      host is None and text.lower().endswith(_FILE_ENDS) and match["file"] is None
    ):
      return None
    return cls._checked(match["repo"], match["revision"], match["file"])

  @classmethod
  def _checked(cls, repo: str, revision: str | None, file: str | None) -> Self:
    if ".." in repo or "--" in repo or not _ADDRESS.fullmatch(repo):
      raise ValueError(f"{repo!r} is no name of a model on the hub: org/name")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
      raise ValueError(f"{repo}: {revision!r} is no revision: a branch, a tag or a commit")
    if file is not None:
      check_file_name(file)
    return cls(repo, revision or "main", file)


def check_file_name(name: str) -> str:
  """A file's name in a repository, which a server chose, as it is.

  Raises: ValueError: joined to a folder it could lead out of it, or it is no printable name.
  """
  parts = name.split("/")
  if not name.isprintable() or "\\" in name or ":" in name or len(name) > 1024:
    raise ValueError(f"the hub names a file {name[:200]!r}: not taken")
  if any(part in ("", ".", "..") for part in parts):
    raise ValueError(f"the hub names a file {name!r}, outside of its folder: not taken")
  return name

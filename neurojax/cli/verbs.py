"""The verbs of the command line, by purpose: where each lies, and one line about it."""

from typing import NamedTuple


class Entry(NamedTuple):
  """A verb.

  Attributes:
    place: Module in `neurojax.cli` and the class that tyro parses.
    does: One line about it.
  """

  place: str
  does: str


PURPOSES: dict[str, dict[str, Entry]] = {
  "Run a model": {
    "demo": Entry("demo:Demo", "cut the packaged model into stages; compare with one process"),
    "generate": Entry("generate:Generate", "continue a text"),
    "chat": Entry("chat:Chat", "talk with a model"),
    "serve": Entry("serve:Serve", "serve a model over HTTP, with OpenAI's interface"),
    "stage": Entry("stage:Stage", "serve layers of a model to a pipeline, on each host"),
  },
  "Train a model": {
    "data prepare": Entry("data:Prepare", "make token shards of text"),
    "data check": Entry("data:Check", "verify token shards and show documents"),
    "train": Entry("train:Train", "train a model, or continue a training run"),
    "export": Entry("export:Export", "write the model of a training run as a model file"),
  },
  "Size a model for machines": {
    "probe": Entry("probe:Probe", "measure this host and its links for a fleet file"),
    "size": Entry("size:Size", "choose the architecture that a fleet trains or serves best"),
    "plan": Entry("plan:Planning", "decide which host holds which layers"),
    "simulate": Entry("simulate:Simulate", "serve requests by a plan, without the machines"),
  },
  "Work with model files": {
    "pull": Entry("pull:Pulling", "download a model from the hub"),
    "inspect": Entry("inspect:Inspect", "print what a model file holds"),
    "convert": Entry("convert:Convert", "write a model as GGUF or as a folder for transformers"),
    "tokenize": Entry("tokenize:Tokenize", "print the token ids of a text"),
  },
  "Measure": {
    "eval ppl": Entry("evaluate:Perplexity", "perplexity of a text"),
    "eval golden": Entry("evaluate:Golden", "compare answers with known ones, token by token"),
    "eval logits": Entry("evaluate:Logits", "write logits, to compare implementations"),
    "bench decode": Entry("bench:Decode", "speed of prefill and decode"),
    "bench engine": Entry("bench_engine:Engine", "speed with many requests at once"),
    "bench gemm": Entry("bench:Gemm", "speed of matrix products by ternary weights"),
    "bench attention": Entry("bench:Attention", "speed of attention over the cache"),
    "bench int8": Entry("bench:Int8", "speed of matrix products by int8 weights"),
    "bench train": Entry("bench_train:Train", "speed of a training step"),
  },
}

VERBS: dict[str, Entry] = {
  name: entry for entries in PURPOSES.values() for name, entry in entries.items()
}

_HEAD = """\
usage: neurojax [-v] VERB [OPTIONS]
       neurojax VERB --help
       neurojax --version

Ternary language models: sized, trained, packed to two bits, cut into stages and
run across unlike machines. Example: neurojax demo"""

_FOOT = """\
-v, --verbose and NEUROJAX_LOG=debug show log lines, also those of XLA and gRPC.
Exit codes: 0 done; 1 a check failed; 2 wrong use or a bad file; 3 a stage or an
engine failed; 130 interrupted; 143 ended by SIGTERM.
"""


def overview() -> str:
  """Every verb with its line, by purpose."""
  blocks = [f"{title}\n{listed(entries)}" for title, entries in PURPOSES.items()]
  return "\n\n".join([_HEAD, *blocks, _FOOT])


def listed(entries: dict[str, Entry]) -> str:
  return "\n".join(f"  {name:<17}{entry.does}" for name, entry in entries.items())


def members(group: str) -> dict[str, Entry]:
  """Verbs of two words that begin with `group`; empty if there are none."""
  return {name: entry for name, entry in VERBS.items() if name.startswith(f"{group} ")}


def split(arguments: list[str]) -> tuple[str, list[str]]:
  """A command line as verb and options.

  Raises: ValueError: it begins with no verb; the message names the nearest ones.
  """
  for words in (2, 1):
    if (name := " ".join(arguments[:words])) in VERBS:
      return name, arguments[words:]
  among = members(arguments[0])
  if among and (len(arguments) == 1 or arguments[1].startswith("-")):
    raise ValueError(f"name one of {_or(list(among))}")
  near = _nearest(arguments[1 if among else 0], among or VERBS)
  hint = f"perhaps {_or(near)}" if near else "`neurojax` alone lists the verbs"
  raise ValueError(f"there is no verb {' '.join(arguments[: 2 if among else 1])}: {hint}")


def _or(names: list[str]) -> str:
  return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _nearest(word: str, among: dict[str, Entry]) -> list[str]:
  """Verbs with a word spelled nearly like the given one, else verbs whose line has it."""
  import difflib

  words = {part for name in among for part in name.split()}
  close = difflib.get_close_matches(word, words, 2, 0.6)
  near = [name for part in close for name in among if part in name.split()]
  told = [name for name, entry in among.items() if len(word) > 3 and word[:6] in entry.does]
  return list(dict.fromkeys(near)) or told[:3]

"""What a folder says about its model: name and licence, in the words of GGUF's general.* keys."""

import re
from collections.abc import Mapping
from pathlib import Path

_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
README = "README.md"
BESIDE = (README, *_LICENSES, "NOTICE")
"""Files that say on which terms a model may be used."""

# Keys of a model card's front matter, https://huggingface.co/docs/hub/model-cards.
_KEYS = {
  "license": "general.license",
  "license_name": "general.license.name",
  "license_link": "general.license.link",
}
_MOST_BYTES = 1 << 16


def read_card(folder: Path, config: Mapping[str, object]) -> dict[str, str]:
  """Read name and licence from README.md, a licence file and config.json.

  Args:
    config: The table of config.json.
  Returns: Those of "general.name", "general.license", "general.license.name" and
    "general.license.link" that the folder gives.
  """
  card = {}
  if isinstance(name := config.get("_name_or_path"), str) and name:
    card["general.name"] = name
  if isinstance(license_ := config.get("license"), str) and license_:
    card["general.license"] = license_
  card |= _front_matter(_head(folder / README))
  if "general.license" not in card:
    for file in _LICENSES:
      title = next((line.strip() for line in _head(folder / file).splitlines() if line.strip()), "")
      if title:
        return card | {
          "general.license": "other",
          "general.license.name": title.strip("# ")[:200],
          "general.license.link": file,
        }
  return card


def write_card(card: Mapping[str, str]) -> str:
  """A README.md with a front matter that `read_card` reads; empty if the card has no more than a name."""
  said = {key: card[general] for key, general in _KEYS.items() if card.get(general)}
  about = [
    card[key] for key in ("general.description", "general.author", "general.url") if card.get(key)
  ]
  if not said and not about:
    return ""
  lines = ["---", *(f"{key}: {_line(value)}" for key, value in said.items()), "---", ""]
  lines = lines if said else []
  lines += [f"# {_line(card.get('general.name', 'Model'))}", ""]
  for text in about:
    lines += [text, ""]
  return "\n".join(lines)


def _head(path: Path) -> str:
  if not path.is_file():
    return ""
  with path.open("rb") as file:
    return file.read(_MOST_BYTES).decode("utf-8", errors="replace")


def _front_matter(text: str) -> dict[str, str]:
  """The licence's keys between the first two lines of "---"; a list gives its first entry."""
  match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
  if match is None:
    return {}
  found = {}
  for key, general in _KEYS.items():
    value = re.search(rf"(?m)^{key}:[ \t]*(?:\n[ \t]*-[ \t]*)?(\S.*)$", match[1])
    if value is not None and (said := value[1].strip().strip("'\"")):
      found[general] = said[:1000]
  return found


def _line(value: str) -> str:
  return " ".join(value.split())

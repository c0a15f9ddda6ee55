"""What transformers renders: chat.json.

    python tests/tokenizer/golden/make_chat.py FOLDER_OF_TEMPLATES      (under a Python with transformers)

For each template and conversation the SHA-256 of the text, or null where the template refuses. Also of
the templates of `small_templates.py`, in full.
"""

import hashlib
import json
import sys
from pathlib import Path

import transformers
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from conversations import CONVERSATIONS, SPECIAL  # noqa: E402
from small_templates import SMALL  # noqa: E402


def render(source: str, arguments: dict) -> str | None:
  """None: the template refuses, or fails."""
  arguments = {"add_generation_prompt": True, **arguments, **SPECIAL}
  # As `apply_chat_template` does first.
  messages = chat_template_utils._normalize_chat_messages(arguments.pop("messages"))
  try:
    texts, _ = chat_template_utils.render_jinja_template(
      conversations=[messages], chat_template=source, **arguments
    )
  except Exception as error:
    print(f"  {type(error).__name__}: {error}"[:100], file=sys.stderr)
    return None
  return texts[0]


def main(folder: str) -> None:
  answers: dict[str, dict] = {"transformers": transformers.__version__, "real": {}, "small": {}}
  for path in sorted(Path(folder).glob("*.jinja")):
    texts = {name: render(path.read_text(), case) for name, case in CONVERSATIONS.items()}
    answers["real"][path.stem] = {
      name: None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]
      for name, text in texts.items()
    }
  for name, source in SMALL.items():
    answers["small"][name] = render(source, CONVERSATIONS["call"])
  (HERE / "chat.json").write_text(json.dumps(answers, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
  main(*sys.argv[1:])

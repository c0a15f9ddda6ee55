"""Draws the figures of the documentation as SVG, readable on light and on dark pages.

python docs/figures/draw.py
"""

from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
# Boxes bring their own ground; lines and words between them are of a middle grey.
INK, LINE, WORD = "#1f2328", "#7d8590", "#7d8590"
BLUE, GREEN, AMBER, GREY = "#cfe4ff", "#c9ecd0", "#ffe2b8", "#e4e7eb"
WIDTH, HEIGHT = 132, 46


class Drawing:
  """Collects shapes, and writes them as one SVG file."""

  def __init__(self, width: int, height: int, title: str) -> None:
    self.parts = [
      f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
      f'width="{width}" height="{height}" role="img" font-family="Helvetica, Arial, sans-serif">',
      f"<title>{escape(title)}</title>",
      '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
      f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>',
    ]

  def box(self, x: int, y: int, lines: str, fill: str, w: int = WIDTH, h: int = HEIGHT) -> None:
    """Draw a box with one or more centred lines; the first is bold."""
    self.parts.append(
      f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{fill}" stroke="{LINE}"/>'
    )
    rows = lines.split("\n")
    for i, row in enumerate(rows):
      at = y + h / 2 + 5 + (i - (len(rows) - 1) / 2) * 16
      weight = ' font-weight="bold"' if i == 0 else ""
      self.parts.append(
        f'<text x="{x + w / 2:g}" y="{at:g}" text-anchor="middle" font-size="{13 if i == 0 else 12}"'
        f'{weight} fill="{INK}">{escape(row)}</text>'
      )

  def frame(self, x: int, y: int, w: int, h: int) -> None:
    self.parts.append(
      f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="9" fill="none" stroke="{LINE}" '
      'stroke-dasharray="5 4"/>'
    )

  def word(self, x: int, y: int, text: str, anchor: str = "middle", size: int = 12) -> None:
    weight = ' font-weight="bold"' if size > 12 else ""
    self.parts.append(
      f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}"{weight} '
      f'fill="{WORD}">{escape(text)}</text>'
    )

  def arrow(self, *points: tuple[int, int], both: bool = False) -> None:
    path = " L".join(f"{x} {y}" for x, y in points)
    start = ' marker-start="url(#tip)"' if both else ""
    self.parts.append(
      f'<path d="M{path}" fill="none" stroke="{LINE}" stroke-width="1.6"{start} '
      'marker-end="url(#tip)"/>'
    )

  def text(self) -> str:
    return "\n".join([*self.parts, "</svg>"]) + "\n"


def rivers() -> str:
  """The three ways through neurojax: size, train and run, with the commands between them."""
  drawing = Drawing(1010, 312, "neurojax sizes, trains and runs ternary models")
  x, y = (70, 266, 462, 658, 854), (22, 122, 252)
  for row, name in enumerate(("size", "train", "run")):
    drawing.word(10, y[row] + 28, name, "start", 15)
  rows = (
    (("hosts", "fleet file", "architecture", None, "plan"), GREEN),
    (("text", "token shards", "training run", "model file", None), AMBER),
    (("model file", "parameters", "stages", "engine", "text"), BLUE),
  )
  for row, (names, fill) in enumerate(rows):
    for column, name in enumerate(names):
      if name:
        drawing.box(x[column], y[row], name, fill)
  verbs = (
    (("probe", 0, 1), ("size", 1, 2), ("plan", 2, 4)),
    (("data prepare", 0, 1), ("train", 1, 2), ("export", 2, 3)),
    (("load", 0, 1), ("compile", 1, 2), ("connect", 2, 3), ("generate", 3, 4)),
  )
  for row, steps in enumerate(verbs):
    for verb, first, last in steps:
      start, end = x[first] + WIDTH, x[last]
      drawing.arrow((start + 2, y[row] + 23), (end - 2, y[row] + 23))
      for line, part in enumerate(verb.split()):
        drawing.word((start + end) // 2, y[row] + (16, 38)[line], part)
  middle = WIDTH // 2
  drawing.arrow((x[2] + middle, y[0] + HEIGHT + 2), (x[2] + middle, y[1] - 2))
  drawing.arrow(
    (x[3] + middle, y[1] + HEIGHT + 2),
    (x[3] + middle, 198),
    (x[0] + middle, 198),
    (x[0] + middle, y[2] - 2),
  )
  drawing.arrow(
    (x[4] + middle, y[0] + HEIGHT + 2),
    (x[4] + middle, 226),
    (x[2] + middle, 226),
    (x[2] + middle, y[2] - 2),
  )
  return drawing.text()


def pipeline() -> str:
  """A pipeline of three stages on two hosts, and its coordinator."""
  drawing = Drawing(900, 330, "A pipeline: a coordinator and three stages on two hosts")
  drawing.frame(18, 14, 150, 300)
  drawing.word(93, 34, "any machine", size=13)
  drawing.box(30, 118, "coordinator\ntokenizer\nrequests\nplan, serving", GREEN, 126, 92)
  drawing.frame(236, 14, 392, 300)
  drawing.word(432, 34, "host a", size=13)
  drawing.box(252, 104, "stage 0\nembedding\nlayers 0..11\ntheir caches", BLUE, 150, 120)
  drawing.box(462, 104, "stage 1\nlayers 12..23\ntheir caches", BLUE, 150, 120)
  drawing.box(252, 240, "GPU 0", GREY, 150, 34)
  drawing.box(462, 240, "GPU 1", GREY, 150, 34)
  drawing.frame(696, 14, 186, 300)
  drawing.word(789, 34, "host b", size=13)
  drawing.box(714, 104, "stage 2\nlayers 24..35\nfinal norm, head\nsampler, caches", BLUE, 150, 120)
  drawing.box(714, 240, "GPU 0", GREY, 150, 34)
  drawing.arrow((158, 164), (250, 164))
  drawing.word(203, 156, "tokens")
  drawing.arrow((404, 164), (460, 164))
  drawing.arrow((614, 164), (712, 164))
  drawing.word(662, 156, "activations")
  drawing.arrow((789, 102), (789, 66), (93, 66), (93, 116))
  drawing.word(432, 60, "the next token, and its log-probability")
  drawing.word(432, 302, "each stage server holds a span of layers on one device")
  return drawing.text()


FIGURES = {"rivers.svg": rivers, "pipeline.svg": pipeline}

if __name__ == "__main__":
  for name, draw in FIGURES.items():
    (HERE / name).write_text(draw(), encoding="utf-8")

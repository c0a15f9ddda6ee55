"""Run the demo as a person does and put its transcript into the README.

python -m experiments.demo.run
"""

import os
import subprocess
import sys

from experiments.readme import block

if __name__ == "__main__":
  command = [sys.executable, "-m", "neurojax", "demo"]
  environment = {**os.environ, "COLUMNS": "96", "NO_COLOR": "1"}
  done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
  lines = [line.rstrip() for line in done.stdout.splitlines()]
  block("demo", "```\n$ make demo\n" + "\n".join(lines) + "\n```\n")

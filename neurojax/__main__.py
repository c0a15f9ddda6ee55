import sys

from neurojax.cli import main

if __name__ == "__main__":
  sys.exit(main())

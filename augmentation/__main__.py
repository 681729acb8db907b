"""`python -m augmentation`: the same as the console script `sep-mldc-augment`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tritonmoe`: the same as the command tritonmoe."""

import sys

from tritonmoe.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.overlap`: compute and communication alone, in series and overlapped, on emulated or real links."""

import sys

from tritonmoe.benchmarks.overlap import main

if __name__ == "__main__":
    sys.exit(main())

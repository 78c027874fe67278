"""`python -m bench.auto`: the tuner against the fastest plan of a sweep, the simulator against the measured times."""

import sys

from tritonmoe.benchmarks.auto import main

if __name__ == "__main__":
    sys.exit(main())

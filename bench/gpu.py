"""`python -m bench.gpu --out DIR`: correctness, layer and kernels on a GPU; goes on where it was stopped."""

import sys

from tritonmoe.benchmarks.gpu import main

if __name__ == "__main__":
    sys.exit(main())

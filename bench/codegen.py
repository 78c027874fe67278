"""`python -m bench.codegen`: every kernel for six targets under two Tritons, into bench/results/codegen.json."""

import sys

from tritonmoe.benchmarks.codegen import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.overlap`: the schedule against max(compute, communication), emulated."""

from tritonmoe.benchmarks.overlap import main

if __name__ == "__main__":
    main()

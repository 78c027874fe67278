"""`python -m bench.simulator`: the simulator against emulated ranks, and how long it takes for 4096 ranks."""

from tritonmoe.benchmarks.simulator import main

if __name__ == "__main__":
    main()

"""`python -m bench.scheduler`: what the executor costs over the bare operations."""

from tritonmoe.benchmarks.scheduler import main

if __name__ == "__main__":
    main()

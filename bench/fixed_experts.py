"""`python -m bench.fixed_experts`: the schedule against max(compute, communication), emulated."""

from tritonmoe.benchmarks.fixed_experts import main

if __name__ == "__main__":
    main()

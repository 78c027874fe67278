"""`python -m bench.moe_mlp`: one-device experts against transformers."""

from tritonmoe.benchmarks.moe_mlp import main

if __name__ == "__main__":
    main()

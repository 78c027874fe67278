"""`python -m bench.transformers`: a whole model and a block under every experts implementation."""

from tritonmoe.benchmarks.transformers import main

if __name__ == "__main__":
    main()

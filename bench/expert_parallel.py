"""`python -m bench.expert_parallel --netns 2`: a model's training step under transformers' exchange and under ours."""

import sys

from tritonmoe.benchmarks.expert_parallel import main

if __name__ == "__main__":
    sys.exit(main())

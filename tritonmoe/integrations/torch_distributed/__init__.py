"""Expert parallelism for any module: parallelize() and what goes around a training step."""

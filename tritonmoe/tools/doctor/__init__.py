"""What bounds a step of any trainer: readers of traces, one model of a run, attribution and its verdict."""

"""Where experts live: ExpertShards, parameters of which each rank holds a part, and what DDP, FSDP2, optimizers need."""

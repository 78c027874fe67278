"""Where experts live: ExpertShards, the parameters of a rank, and what DDP, FSDP2 and optimizers need for these."""

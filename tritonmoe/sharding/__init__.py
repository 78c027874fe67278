"""Parameters of which each rank holds a part: as DTensors, and what DDP, FSDP2 and optimizers need for them."""

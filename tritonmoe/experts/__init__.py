"""The experts of one rank: moe_mlp and what it is made of."""

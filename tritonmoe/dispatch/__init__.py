"""Which row goes where: the plan of one call, which all ranks agree on."""

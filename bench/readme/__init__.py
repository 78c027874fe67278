"""The tables, lists and notebook of README and docs, made from results and from the code itself."""

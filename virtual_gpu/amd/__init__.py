"""Machines that execute AMDGCN assembly."""

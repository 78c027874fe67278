"""Weights of a model that trains, as (name, tensor) of its checkpoint, to whoever generates; and the other way."""

"""The layer: a router and its experts as modules, on one device or, through the scheduler, on many ranks."""

from tritonmoe.layer.grouped_experts import GroupedExperts, experts_of_parameters
from tritonmoe.layer.moe_layer import MoELayer, report_of

__all__ = ["GroupedExperts", "MoELayer", "experts_of_parameters", "report_of"]

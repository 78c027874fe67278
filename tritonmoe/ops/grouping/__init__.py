"""The order in which a rank's routed pairs are stored, and what it is made of."""

from tritonmoe.ops.grouping.grouping import Grouping, GroupingBlock
from tritonmoe.ops.grouping.row_sources import RowSources

__all__ = ["Grouping", "GroupingBlock", "RowSources"]

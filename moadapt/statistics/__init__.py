"""Who is routed where: counts of what routers decide, and measures of them."""

from __future__ import annotations

from moadapt.statistics.counts import RouterCounts
from moadapt.statistics.recording import record_routing
from moadapt.statistics.statistics import RoutingStatistics
from moadapt.statistics.stock import describing
from moadapt.statistics.trace import Trace

__all__ = ["RouterCounts", "RoutingStatistics", "Trace", "describing", "record_routing"]

"""Router kinds, one file each. Importing this package fills the table `moadapt.registry.ROUTERS`."""

from moadapt.routers.base import Router, RouterConfig
from moadapt.routers.softmax import SoftmaxRouter, SoftmaxRouterConfig
from moadapt.routers.top_k import TopKRouter, TopKRouterConfig

__all__ = ["Router", "RouterConfig", "SoftmaxRouter", "SoftmaxRouterConfig", "TopKRouter", "TopKRouterConfig"]

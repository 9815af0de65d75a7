"""Router kinds, one file each. Importing this package fills the table `moadapt.registry.ROUTERS`."""

from moadapt.routers.base import Router, RouterConfig, RouterSample
from moadapt.routers.norm_regression import NormRegressionRouter, NormRegressionRouterConfig
from moadapt.routers.relu import ReLURouter, ReLURouterConfig
from moadapt.routers.representative import RepresentativeRouter, RepresentativeRouterConfig
from moadapt.routers.sigmoid_ste import SigmoidSTERouter, SigmoidSTERouterConfig
from moadapt.routers.softmax import SoftmaxRouter, SoftmaxRouterConfig
from moadapt.routers.task_table import TaskTableRouter, TaskTableRouterConfig
from moadapt.routers.top_k import TopKRouter, TopKRouterConfig

__all__ = [
    "NormRegressionRouter",
    "NormRegressionRouterConfig",
    "ReLURouter",
    "ReLURouterConfig",
    "RepresentativeRouter",
    "RepresentativeRouterConfig",
    "Router",
    "RouterConfig",
    "RouterSample",
    "SigmoidSTERouter",
    "SigmoidSTERouterConfig",
    "SoftmaxRouter",
    "SoftmaxRouterConfig",
    "TaskTableRouter",
    "TaskTableRouterConfig",
    "TopKRouter",
    "TopKRouterConfig",
]

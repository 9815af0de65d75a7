"""Loading a base model that no process could hold whole: under ZeRO-3 its weights are taken apart as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moadapt.train.training_config import TrainingConfig


@contextmanager
def partitioned_loading(
    deepspeed: str | Path | dict[str, Any] | None, training: TrainingConfig, hidden_size: int
) -> Iterator[None]:
    """While it is open, `from_pretrained` of transformers spreads a model over the processes if ZeRO-3 is asked for.

    Adapters must be put in after it is closed: what is built inside would be taken apart before it is initialised.

    Args:
        deepspeed: as `MultiTaskTrainer` takes it.
        training: the training options, which complete DeepSpeed's.
        hidden_size: of the base model; sets the bucket sizes that say `auto`.

    Raises:
        ConfigError: DeepSpeed is not installed, or its configuration contradicts the training options.
    """
    from moadapt.train.deepspeed_config import build_deepspeed, read_deepspeed, zero_stage

    if deepspeed is None or zero_stage(read_deepspeed(deepspeed)) != 3:
        yield
        return
    from moadapt.train.deepspeed_engine import bootstrap

    processes = bootstrap(training)
    settings = build_deepspeed(
        deepspeed, training, processes.world_size, hidden_size, cuda=processes.device.type == "cuda"
    )
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(settings)  # transformers holds a weak reference to it only
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive

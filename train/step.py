"""One optimizer step: its micro-batches, their common normalisation, and the check before anything is applied.

All micro-batches of a step are fetched first, and their response tokens are counted over accumulation and processes
(n). The model gets n. With L_b the sum of token losses and A_b the weighted auxiliary losses of micro-batch b, which
has n_b response tokens, the loss of the step is

    (sum_b L_b) / n + sum_b (n_b / n) A_b

whatever the number of micro-batches and processes; the language-model part is the mean over all response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.train.callbacks import TrainerState
from moadapt.train.collate import Collator
from moadapt.train.engine import Engine, TrainingError
from moadapt.train.evaluation import count_targets
from moadapt.train.optimizer import LearningRates
from moadapt.train.sampling import MixtureSampler
from moadapt.train.step_losses import StepLosses, StepValues
from moadapt.train.task_ids import TaskIds
from moadapt.train.tasks import Task


@dataclass
class StepRunner:
    """Runs optimizer steps.

    Attributes:
        engine: forward, backward, optimizer.
        sampler: says which rows a micro-batch has.
        tasks: hold the rows.
        task_ids: the model's ids of the tasks.
        collator: makes batches of them.
        rates: the learning rates by step.
        accumulation: micro-batches of a step on one process.
    """

    engine: Engine
    sampler: MixtureSampler
    tasks: Sequence[Task]
    task_ids: TaskIds
    collator: Collator
    rates: LearningRates
    accumulation: int

    def run(self, state: TrainerState) -> tuple[StepValues, float | None] | None:
        """Do the next step and move `state` on. Collective.

        Returns:
            The step's losses and the norm of its gradient (None where fp16 skipped the step); or None, with nothing
            done, when a process wants to stop.

        Raises:
            TrainingError: the loss or the gradient is not finite; on every process, and before the weights change.
        """
        engine, processes = self.engine, self.engine.processes
        batches = [self._batch(state, micro) for micro in range(self.accumulation)]
        targets = [count_targets(batch["labels"], self.collator.is_encoder_decoder) for batch in batches]
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        counts = processes.all_sum(torch.tensor([sum(targets), tokens, int(state.should_stop)]))
        items, tokens, stop = (int(count) for count in counts)
        if stop:
            state.stop_reason = state.stop_reason or "a callback ended the run"
            return None
        num_items = torch.tensor(max(items, 1), device=processes.device)
        names = [task.name for task in self.tasks]
        losses = StepLosses(names, items, self.collator.is_encoder_decoder, processes)
        for micro, (batch, count) in enumerate(zip(batches, targets, strict=True)):
            output = engine.forward(dict(self.task_ids.for_model(batch, processes.device)), num_items)
            losses.add(output, engine.model.last_losses, batch, count)
            engine.backward(output.loss, last=micro == self.accumulation - 1)
        values = losses.reduce()
        where = f"step {state.global_step + 1}"
        if not math.isfinite(values.loss):
            raise TrainingError(
                f"{where}: the loss is {values.loss}, in tasks {', '.join(values.broken_tasks())}. Nothing was applied "
                "in this step; the weights are those of the step before. Lower learning_rate, or look at these rows"
            )
        try:
            norm = engine.step(self.rates.at(state.global_step))
        except TrainingError as error:
            tasks = ", ".join(values.task_weights)
            raise TrainingError(f"{where} (tasks {tasks}): {error}; lower learning_rate or max_grad_norm") from None
        engine.model.end_step(values.parts)
        state.global_step += 1
        state.micro_batch += self.accumulation * processes.world_size
        state.tokens += tokens
        state.epoch = state.micro_batch / self.sampler.batches_per_epoch
        return values, norm

    def _batch(self, state: TrainerState, micro: int) -> dict[str, Tensor]:
        """This process's micro-batch number `micro` of the next step, on the CPU."""
        processes = self.engine.processes
        rows = self.sampler.batch(state.micro_batch + micro * processes.world_size + processes.rank)
        return self.collator([self.tasks[task].train[row] for task, row in rows])

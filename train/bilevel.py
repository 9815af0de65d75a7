"""Two levels: the coefficients of the routers' activation learn from evaluation rows, all else from training rows.

MiLoRA (arXiv 2410.18035) learns the coefficients Θ of its rational activation as DARTS (1806.09055) learns an
architecture, by first-order alternation with the other adapter tensors Ω:

    Ω ← AdamW(∇_Ω L(training rows; Ω, Θ)),  then  Θ ← AdamW(∇_Θ L(evaluation rows; Ω, Θ))

Both losses are that of training (`moadapt.train.step`), auxiliary losses and dropout included, and both batches have
the same size. Θ is not part of the first gradient, nor of its norm; the second gradient is not clipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.train.collate import Collator
from moadapt.train.data_config import SamplingConfig
from moadapt.train.engine import Engine, OptimizerState, TrainingError, collect_torch_state, set_torch_state
from moadapt.train.evaluation import count_targets
from moadapt.train.optimizer import LearningRates, ParameterGroup, build_optimizer
from moadapt.train.sampling import MixtureSampler
from moadapt.train.task_ids import TaskIds
from moadapt.train.tasks import Task
from moadapt.train.training_config import TrainingConfig

GROUP = "activation"


def evaluation_sampler(
    tasks: Sequence[Task], config: TrainingConfig, sampling: SamplingConfig, weights: Sequence[float] | None
) -> MixtureSampler:
    """Mixes the tasks' evaluation rows as the training rows are mixed; tasks without any take no part.

    Args:
        tasks: the tasks.
        config: the batch size and the seed.
        sampling: how training rows are mixed.
        weights: for strategy `weights`, one for each task.

    Raises:
        ConfigError: no task that is sampled has evaluation rows.
    """
    if weights is not None:
        weights = [weight if task.eval else 0.0 for task, weight in zip(tasks, weights, strict=True)]
    if not any(task.eval for task in tasks) or (weights is not None and not any(weights)):
        raise ConfigError(
            "training.bilevel_activation: learns from evaluation rows, and no task that is sampled has any; give "
            "eval_path, eval_split or eval_fraction"
        )
    seed = config.seed if config.data_seed is None else config.data_seed
    sizes = [len(task.eval) for task in tasks]
    return MixtureSampler(sizes, config.per_device_train_batch_size, sampling, seed, weights=weights)


class BilevelActivation:
    """Steps on the coefficients of the routers' activation, between the steps of the engine's optimizer.

    The coefficients stay out of the engine: they are kept whole, in fp32 (fp64 in a float64 model), on every process.

    Args:
        group: the coefficients.
        sampler: of the evaluation rows, see `evaluation_sampler`.
        tasks: hold the rows.
        task_ids: the model's ids of the tasks.
        collator: makes batches of them.
        config: the training options.
        total_steps: optimizer steps of the whole run, for the learning rate, which follows the run's schedule.
    """

    def __init__(
        self,
        group: ParameterGroup,
        sampler: MixtureSampler,
        tasks: Sequence[Task],
        task_ids: TaskIds,
        collator: Collator,
        config: TrainingConfig,
        total_steps: int,
    ) -> None:
        self.group = group
        self.rates = LearningRates([group], config, total_steps)
        self._sampler = sampler
        self._tasks = tasks
        self._task_ids = task_ids
        self._collator = collator
        self._config = config
        self._first = {name: value.detach().clone() for name, value in group.parameters}
        self._engine: Engine | None = None
        self._optimizer: torch.optim.AdamW | None = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the `with` block the coefficients get no gradient."""
        for _, parameter in self.group.parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for _, parameter in self.group.parameters:
                parameter.requires_grad_(True)

    def attach(self, engine: Engine) -> None:
        """Take the coefficients over from an engine that has just been built, and undo a rounding to half precision.

        Raises:
            ConfigError: the engine takes tensors apart (ZeRO-3).
        """
        if engine.zero_stage == 3:
            raise ConfigError(
                "training.bilevel_activation: does not go with ZeRO-3, which takes the coefficients apart; use "
                "deepspeed: zero1 or zero2"
            )
        for name, parameter in self.group.parameters:
            dtype = torch.promote_types(self._first[name].dtype, torch.float32)
            parameter.data = self._first[name].to(parameter.device, dtype, copy=True)
        self._engine = engine
        self._optimizer = build_optimizer([self.group], self._config)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the coefficients by those among an adapter's tensors."""
        for name, parameter in self.group.parameters:
            parameter.copy_(weights[name])

    def load_state(self, state: OptimizerState) -> None:
        """Set AdamW's state from a checkpoint's; one of a run without this option counts all its steps."""
        assert self._optimizer is not None
        step = state.step if state.bilevel_step is None else state.bilevel_step
        set_torch_state(self._optimizer, self.group.parameters, replace(state, step=step))

    def add_state(self, state: OptimizerState) -> OptimizerState:
        """The engine's AdamW state together with the one of the coefficients."""
        assert self._optimizer is not None
        own = collect_torch_state(self._optimizer, self.group.parameters)
        moments = {**state.exp_avg, **own.exp_avg}, {**state.exp_avg_sq, **own.exp_avg_sq}
        return OptimizerState(state.step, *moments, bilevel_step=own.step)

    def run(self, step: int) -> float | None:
        """Do what is due after an optimizer step. Collective.

        Args:
            step: optimizer steps done. The rows depend on it alone.

        Returns:
            The loss on the evaluation rows, or None where no step of the coefficients was due.

        Raises:
            TrainingError: the loss or the gradient is not finite; on every process, and before the coefficients change.
        """
        if step % self._config.bilevel_steps:
            return None
        assert self._engine is not None
        assert self._optimizer is not None
        parameters: list[nn.Parameter] = [parameter for _, parameter in self.group.parameters]
        loss, gradient = self._loss_and_gradient(step // self._config.bilevel_steps - 1, parameters)
        if not (loss.isfinite() and gradient.isfinite().all()):
            raise TrainingError(
                f"step {step}: bilevel_activation: the loss on evaluation rows is {float(loss)}, or its gradient is "
                "not finite; the coefficients are those of the step before. Lower activation_learning_rate"
            )
        self._optimizer.param_groups[0]["lr"] = self.rates.at(step - 1)[0]
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, torch.split(gradient, sizes), strict=True):
            parameter.grad = part.view(parameter.shape).to(parameter.device, parameter.dtype)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss)

    def _loss_and_gradient(self, update: int, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """The loss and its gradient, flat, in float64 on the CPU, over all micro-batches and processes."""
        assert self._engine is not None
        engine, processes = self._engine, self._engine.processes
        accumulation = self._config.gradient_accumulation_steps
        batches = []
        for micro in range(accumulation):
            rows = self._sampler.batch((update * accumulation + micro) * processes.world_size + processes.rank)
            batches.append(self._collator([self._tasks[task].eval[row] for task, row in rows]))
        targets = sum(count_targets(batch["labels"], self._collator.is_encoder_decoder) for batch in batches)
        items = processes.all_sum(torch.tensor([targets])).clamp(min=1).to(processes.device)[0]
        total = torch.zeros(1 + sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
        total = total.to(processes.device)
        for batch in batches:
            with engine.computing():
                inputs = dict(self._task_ids.for_model(batch, processes.device))
                loss: Tensor = engine.model(**inputs, num_items_in_batch=items).loss
            # Asked for these gradients alone, autograd touches no other tensor's, nor the engine's hooks on them.
            gradients = torch.autograd.grad(loss, parameters)
            total += torch.cat([loss.detach().reshape(1).double(), *(g.reshape(-1).double() for g in gradients)])
        total = processes.all_sum(total)
        return total[0], total[1:]

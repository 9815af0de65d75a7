"""`MultiTaskTrainer`: trains a mixture model on several tasks, evaluates it by task, and saves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich import get_console
from torch import Tensor

from moadapt.errors import AdapterError, ConfigError
from moadapt.registry import config_error
from moadapt.train.bilevel import GROUP, BilevelActivation, evaluation_sampler
from moadapt.train.callbacks import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerState,
    callback_states,
    restore_callbacks,
)
from moadapt.train.checkpoint import (
    Checkpoint,
    gather_rng,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    restore_rng,
    rng_state,
    seed_everything,
    set_rng_state,
    write_checkpoint,
)
from moadapt.train.collate import Collator
from moadapt.train.data_config import DataConfig, SamplingConfig
from moadapt.train.engine import Engine, PlainEngine, TrainingError
from moadapt.train.evaluation import EvaluationResult, evaluate_tasks
from moadapt.train.logging import RunLogger, Window, check_trackers
from moadapt.train.optimizer import LearningRates, parameter_groups
from moadapt.train.result import TrainResult
from moadapt.train.routing_checks import check_prompts
from moadapt.train.routing_monitor import RoutingMonitor
from moadapt.train.sampling import MixtureSampler
from moadapt.train.start import check_tasks, clear_output, open_checkpoint, sampler_identity, start_processes
from moadapt.train.step import StepRunner
from moadapt.train.task_ids import TaskIds
from moadapt.train.tasks import Task, load_tasks
from moadapt.train.training_config import TrainingConfig, interval, training_config_from_dict


class MultiTaskTrainer:
    """Trains a `MixtureModel` on several tasks, in one process or several.

    Args:
        model: from `get_mixture_model` (or loaded with `is_trainable=True`).
        tokenizer: the base model's tokenizer.
        data: the data section as a `DataConfig` or a mapping, or a list of loaded tasks (sampled proportionally).
        training: the training options, as a `TrainingConfig` or a mapping.
        deepspeed: None for one process in plain torch, else `zero0` to `zero3`, the path of a DeepSpeed JSON file or
            its contents.
        callbacks: hooks into the loop.
        tasks: the loaded tasks of `data`, where they were loaded already.

    Raises:
        ConfigError: options that do not go together.
        DataError: a data file cannot be used.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: DataConfig | dict[str, Any] | Sequence[Task],
        training: TrainingConfig | dict[str, Any],
        deepspeed: str | Path | dict[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        *,
        tasks: Sequence[Task] | None = None,
    ) -> None:
        self.config = config = training_config_from_dict(training)
        self.deepspeed = deepspeed
        check_trackers(config.report_to)
        self.processes = start_processes(config, deepspeed)
        self.model = model
        self.tokenizer = tokenizer
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.data, loaded = self._load(data, tasks)
        self.tasks: list[Task] = list(loaded)
        check_tasks(self.tasks, config)
        check_prompts(model, self.tasks)
        self.task_ids = TaskIds(model, self.tasks, train=True)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        side = self.data.padding_side if self.data else "right"
        # Left padding shifts tokens, so a model with absolute positions must be told where each row starts.
        positions = side == "left" and "position_ids" in signature(model.base_model.forward).parameters
        self.collator = Collator(pad or 0, side, self.is_encoder_decoder, position_ids=positions)
        self._sampling = self.data.sampling if self.data else SamplingConfig()
        self._shares = self.data.sampling_weights([task.name for task in self.tasks]) if self.data else None
        self.sampler = MixtureSampler(
            [len(task.train) for task in self.tasks],
            config.per_device_train_batch_size,
            self._sampling,
            config.seed if config.data_seed is None else config.data_seed,
            weights=self._shares,
        )
        self._routing = RoutingMonitor(model, config, self.task_ids.names, self.processes)
        self.callbacks = [*callbacks, self._routing]
        if config.early_stopping_patience is not None:
            patience, threshold = config.early_stopping_patience, config.early_stopping_threshold
            self.callbacks.append(
                EarlyStoppingCallback(config.best_metric, patience, threshold, config.higher_is_better)
            )
        micro_batches = config.gradient_accumulation_steps * self.processes.world_size
        self.state = TrainerState(max_steps=config.total_steps(self.sampler.batches_per_epoch / micro_batches))
        self.evaluation: EvaluationResult | None = None
        self._window = Window()
        self._engine: Engine | None = None
        self._bilevel: BilevelActivation | None = None
        self._checkpoint: Checkpoint | None = None
        self._logger: RunLogger | None = None

    def _load(
        self, data: DataConfig | dict[str, Any] | Sequence[Task], tasks: Sequence[Task] | None
    ) -> tuple[DataConfig | None, Sequence[Task]]:
        if isinstance(data, dict):
            try:
                data = DataConfig.model_validate(data)
            except ValidationError as error:
                raise config_error(error, "data") from None
        if not isinstance(data, DataConfig):
            return None, data
        if tasks is None:
            seed = self.config.seed
            tasks = load_tasks(data, self.tokenizer, is_encoder_decoder=self.is_encoder_decoder, seed=seed)
            if self.processes.is_main and not self.config.disable_tqdm:
                for task in tasks:
                    get_console().print(task.report(), highlight=False, markup=False)
        return data, tasks

    def _set_up(self, resume: str | bool | None) -> Engine:
        """Build the engine, once; a checkpoint's weights go into the model before that."""
        if self._engine is not None:
            return self._engine
        config = self.config
        self._checkpoint = open_checkpoint(resume, config, self.sampler, self.processes)
        if self._checkpoint is not None and self.deepspeed is None:
            self.model.load_adapter_state_dict(self._checkpoint.weights)
        self.model.train()
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs or None)
        self.groups = parameter_groups(self.model, config)
        if config.bilevel_activation:
            self._bilevel = self._take_activation_out()
        rates = LearningRates(self.groups, config, self.state.max_steps)
        with self._training_rows_only():
            engine = self._build_engine()
        if self._bilevel is not None:
            self._bilevel.attach(engine)
        self._engine = engine
        if self._checkpoint is not None:
            engine.load_optimizer_state(self._checkpoint.optimizer)
            if self.deepspeed is not None:
                self._load_weights(self._checkpoint.weights)
            if self._bilevel is not None:
                self._bilevel.load_state(self._checkpoint.optimizer)
        self._steps = StepRunner(
            *(engine, self.sampler, self.tasks, self.task_ids, self.collator, rates),
            accumulation=config.gradient_accumulation_steps,
        )
        return engine

    def _build_engine(self) -> Engine:
        if self.deepspeed is None:
            return PlainEngine(self.model, self.groups, self.config)
        from moadapt.train.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(self.model, self.groups, self.config, self.deepspeed, self.processes)

    def _take_activation_out(self) -> BilevelActivation:
        """Leave the coefficients of the routers' activation out of the engine's groups."""
        [group] = [group for group in self.groups if group.name == GROUP]
        self.groups = [other for other in self.groups if other is not group]
        sampler = evaluation_sampler(self.tasks, self.config, self._sampling, self._shares)
        steps = self.state.max_steps
        return BilevelActivation(group, sampler, self.tasks, self.task_ids, self.collator, self.config, steps)

    def _training_rows_only(self) -> AbstractContextManager[None]:
        """Inside the `with` block what is learned from evaluation rows is frozen."""
        return nullcontext() if self._bilevel is None else self._bilevel.frozen()

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the trainable tensors, and the states of losses, by those of a checkpoint. Collective."""
        self.engine.load_adapter_weights(weights)
        if self._bilevel is not None:
            self._bilevel.load_weights(weights)
        self.model.objective.load_states(weights)

    # -- training -------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """What runs the model, once `train` or `evaluate` has set it up."""
        assert self._engine is not None, "train() or evaluate() sets the engine up"
        return self._engine

    def close(self) -> None:
        """Let go of the engine and what it holds; the model stays."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainResult:
        """Train to the end, and save the adapter in `output_dir`. Collective.

        Args:
            resume_from_checkpoint: instead of the option of that name.

        Raises:
            TrainingError: a loss or gradient is not finite, or a checkpoint cannot be written.
            ConfigError: options that do not fit the model, or no checkpoint to resume from.
        """
        config, started, first = self.config, time.monotonic(), self.state.global_step
        resume = config.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        if self._engine is not None and resume_from_checkpoint:
            raise ConfigError("resume_from_checkpoint: the model is set up already; call train() before evaluate()")
        if not resume:
            clear_output(config, self.processes)
        self._set_up(resume)
        seed_everything(config.seed + self.processes.rank)
        if self._checkpoint is not None:
            first = self._restore(self._checkpoint)
        resumed = None if self._checkpoint is None else first
        total, is_main = self.state.max_steps, self.processes.is_main
        self._logger = RunLogger(config, is_main=is_main, total_steps=total, resumed_step=resumed)
        self._routing.logger = self._logger
        self._sum_of_losses = 0.0
        try:
            self._call("on_train_begin")
            if config.eval_on_start and resumed is None:
                self._evaluate_and_compare()
            self._loop()
            if config.load_best_model_at_end:
                self._load_best()
            self._call("on_train_end")
            self.save_model(config.output_dir)
        finally:
            self._logger.close()
        return TrainResult(
            self.state.global_step,
            self._sum_of_losses / max(self.state.global_step - first, 1),
            self.state.tokens,
            time.monotonic() - started,
            self.state.stop_reason if self.state.global_step < total else None,
            self.state.best_value,
            self._best_checkpoint(),
            self.evaluation,
            self._logger.history,
            Path(config.output_dir),
        )

    def _restore(self, checkpoint: Checkpoint) -> int:
        """Take back where the checkpoint stood; the length of the run is this run's."""
        now = {"max_steps": self.state.max_steps, "should_stop": False, "stop_reason": None}
        self.state = TrainerState(**{**checkpoint.trainer, **now})
        restore_callbacks(self.callbacks, checkpoint.callbacks)
        self._window.load_state_dict(checkpoint.window)
        restore_rng(checkpoint.rng, self.processes, self.config.seed + 1009 * self.state.global_step)
        return self.state.global_step

    def _loop(self) -> None:
        config, state, total = self.config, self.state, self.state.max_steps
        log_every = interval(config.logging_steps, total)
        eval_every = interval(config.logging_steps if config.eval_steps is None else config.eval_steps, total)
        save_every = interval(config.save_steps, total)
        clock, tokens = time.monotonic(), state.tokens
        while state.global_step < total:
            epoch = int(state.epoch)
            if not self._step():
                break
            step, last, ends_epoch = state.global_step, state.global_step == total, int(state.epoch) > epoch
            self._call("on_step_end")
            if step % log_every == 0 or last or (step == 1 and config.logging_first_step):
                self._log((state.tokens - tokens) / max(time.monotonic() - clock, 1e-9))
                clock, tokens = time.monotonic(), state.tokens
            paused = time.monotonic()
            keep = False
            if _due(config.eval_strategy, step % eval_every == 0, ends_epoch, last):
                keep = self._evaluate_and_compare() and config.load_best_model_at_end
            if keep or _due(config.save_strategy, step % save_every == 0, ends_epoch, last):
                self.save_checkpoint()
            clock += time.monotonic() - paused  # tokens per second is about training alone

    def _step(self) -> bool:
        """One optimizer step and its entry in the log's window; False when a process wants to stop."""
        assert self._logger is not None
        with self._training_rows_only(), self._routing.recording():
            done = self._steps.run(self.state)
        if done is None:
            return False
        values, norm = done
        bilevel_loss = None if self._bilevel is None else self._bilevel.run(self.state.global_step)
        if bilevel_loss is not None:
            self._window.add("train/bilevel_loss", bilevel_loss)
        self._sum_of_losses += values.loss
        values.add_to(self._window)
        if norm is not None:
            self._window.add("train/grad_norm", norm)
        self._logger.advance(self.state.global_step, values.loss)
        return True

    def _log(self, tokens_per_second: float) -> None:
        assert self._logger is not None
        values = {**self._window.means(), **self._routing.entry(self.state)}
        values["train/tokens_per_second"] = tokens_per_second
        groups, rates = list(self.groups), self._steps.rates.at(self.state.global_step - 1)
        if self._bilevel is not None:
            groups.append(self._bilevel.group)
            rates += self._bilevel.rates.at(self.state.global_step - 1)
        values |= {f"train/learning_rate/{group.name}": rate for group, rate in zip(groups, rates, strict=True)}
        values |= {"epoch": round(self.state.epoch, 6), "tokens": self.state.tokens}
        self._window.clear()
        self._logger.log(values, self.state.global_step)
        for callback in self.callbacks:
            callback.on_log(self, self.state, values)

    def _call(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, self.state)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, metrics: bool = True) -> EvaluationResult:
        """Evaluate every task. Collective. Training is not changed by it: the random state is put back.

        Args:
            metrics: whether to generate answers; false for the losses alone.
        """
        engine = self._set_up(self.config.resume_from_checkpoint)
        random_state = rng_state(self.processes.device)
        try:
            return evaluate_tasks(
                engine.model,
                self.tokenizer,
                self.tasks,
                self.collator,
                batch_size=self.config.per_device_eval_batch_size,
                processes=self.processes,
                computing=engine.computing,
                synced_gpus=engine.zero_stage == 3 and self.processes.world_size > 1,
                eos_token=self.data.eos_token if self.data else None,
                metrics=metrics,
                progress=self._logger.side_progress if self._logger is not None else None,
            )
        finally:
            set_rng_state(random_state, self.processes.device)

    def _evaluate_and_compare(self) -> bool:
        """Evaluate, report, and say whether this is a new best."""
        assert self._logger is not None
        result = self.evaluation = self.evaluate()
        self._logger.log({**result.flat(), "epoch": round(self.state.epoch, 6)}, self.state.global_step, show=False)
        self._logger.show(result.table(f"evaluation at step {self.state.global_step}"))
        value, best = result.value(self.config.best_metric), self.state.best_value
        better = best is None or (value > best if self.config.higher_is_better else value < best)
        if better:
            self.state.best_value, self.state.best_step = value, self.state.global_step
        for callback in self.callbacks:
            callback.on_evaluate(self, self.state, result)
        return better

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> Path:
        """Write `checkpoint-STEP` in `output_dir`, then delete old ones beyond `save_total_limit`. Collective.

        Raises:
            TrainingError: it could not be written; on every process.
        """
        config, state, engine = self.config, self.state, self._set_up(self.config.resume_from_checkpoint)
        optimizer = engine.optimizer_state()
        self._routing.gather()
        content = Checkpoint(
            engine.adapter_weights(),
            optimizer if self._bilevel is None else self._bilevel.add_state(optimizer),
            gather_rng(self.processes),
            state.to_dict(),
            sampler_identity(self.sampler),
            callback_states(self.callbacks),
            self._window.state_dict(),
        )
        path = Path(config.output_dir) / f"checkpoint-{state.global_step}"

        def write() -> None:
            write_checkpoint(path, content, lambda folder: self._save_adapter(content.weights, folder))
            best = state.best_step if config.load_best_model_at_end else None
            prune_checkpoints(config.output_dir, config.save_total_limit, best)

        self._on_first_process(str(path), write)
        for callback in self.callbacks:
            callback.on_save(self, state, path)
        return path

    def save_model(self, output_dir: str | Path) -> None:
        """Save the adapter in fp32, as `MixtureModel.save_pretrained` does. Collective.

        Raises:
            TrainingError: it could not be written; on every process.
        """
        weights = self._set_up(self.config.resume_from_checkpoint).adapter_weights()
        self._on_first_process(str(output_dir), lambda: self._save_adapter(weights, Path(output_dir)))

    def _on_first_process(self, path: str, write: Callable[[], None]) -> None:
        """Write files in one process, and let all processes know how it went."""
        failure: Exception | None = None
        if self.processes.is_main:
            try:
                write()
            except Exception as error:
                failure = error
        if self.processes.any(failure is not None):
            raise TrainingError(f"{path} could not be written: {failure or 'see the first process'}") from failure

    def _save_adapter(self, weights: dict[str, Tensor], folder: Path) -> None:
        self.model.save_pretrained(folder, state_dict=weights)

    def _best_checkpoint(self) -> Path | None:
        path = Path(self.config.output_dir) / f"checkpoint-{self.state.best_step}"
        return path if path in list_checkpoints(self.config.output_dir) else None

    def _load_best(self) -> None:
        """Put the weights of the best evaluation back; each was saved, but for the one before the first step."""
        assert self._logger is not None
        path = self._best_checkpoint()
        if path is not None:
            self._load_weights(read_checkpoint(path).weights)
        elif self.state.best_step == 0:
            self._logger.show("no evaluation was better than the one before the first step; the last weights are kept")
        else:
            raise AdapterError(f"load_best_model_at_end: checkpoint-{self.state.best_step} is gone")


def _due(strategy: str, at_step: bool, ends_epoch: bool, last: bool) -> bool:
    """Whether an evaluation or a checkpoint is due; the last step always has one, unless the strategy is `no`."""
    return strategy != "no" and (last or (at_step if strategy == "steps" else ends_epoch))

"""What `moadapt convert` does: check, calibrate, split, measure what was lost, heal, measure again, save."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moadapt.cli.console import note
from moadapt.cli.processes import progress_bar
from moadapt.cli.texts import read_text
from moadapt.convert import calibration_needs, convert_ffn_to_experts
from moadapt.converted import save_converted
from moadapt.errors import ConfigError
from moadapt.model import MixtureModel
from moadapt.partition import check_config, plan_blocks
from moadapt.pretrained import empty_base, empty_mixture, load_base, load_tokenizer
from moadapt.registry import EXPERTS
from moadapt.run_config import CONFIG_FILE, RunConfig
from moadapt.text_measure import TextResult, measure
from moadapt.train.checkpoint import seed_everything
from moadapt.train.engine import pick_device, place
from moadapt.train.optimizer import parameter_groups
from moadapt.train.tasks import Task, load_tasks
from moadapt.train.text import CalibrationConfig
from moadapt.train.trainer import MultiTaskTrainer

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

TRAINING_FOLDER = "training"
"""Where the healing's checkpoints and logs go, in the folder of the converted model."""


@dataclass
class ConversionReport:
    """What a conversion came to.

    Attributes:
        model: the dense model.
        output: the folder of the converted one.
        results: measurements in their order: `dense`, `ungated` (all experts summed up, which is the dense model
            again), `converted`, and `healed`. None without text.
        text: the file that they were made on, or None.
        seconds: time of `splitting` (calibration included) and `healing`.
        healing: optimizer steps and tokens of the training, or None.
    """

    model: str
    output: Path
    results: dict[str, TextResult] = field(default_factory=dict)
    text: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    healing: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        results = {name: result.to_dict() for name, result in self.results.items()}
        more = {"healing": self.healing} if self.healing is not None else {}
        return {"base_model": self.model, "text": self.text, **results, "seconds": self.seconds, **more}

    def table(self) -> Table:
        """Perplexity and what is at work, one line for each measurement."""
        from rich.table import Table

        table = Table(title=f"perplexity on {self.text}")
        table.add_column("model")
        for name in ("perplexity", "loss", "experts active", "of the FFN", "of the model"):
            table.add_column(name, justify="right")
        for name, result in self.results.items():
            cells = [_percent(share) for share in (result.active_share, result.ffn_share, result.model_share)]
            table.add_row(name, f"{result.perplexity:,.3f}", f"{result.loss:.4f}", *cells)
        return table


def _percent(share: float | None) -> str:
    return "100 %" if share is None else f"{100 * share:.1f} %"


def convert_model(config: RunConfig, output: Path, text: CalibrationConfig | None) -> ConversionReport:
    """Split the model of a config, heal it if the config has data, and save it.

    Args:
        config: the model, the mixture, and if wanted calibration, data and training.
        output: an empty folder, or none yet.
        text: what to measure on; None takes the calibration text.

    Raises:
        MoadaptError: a mistake in the config, the model or the data; before the weights are loaded where that can be.
    """
    _refuse(config)
    assert config.mixture is not None
    planned = plan_blocks(empty_base(config), config.mixture)
    calibration_needs(config.mixture, planned, given=config.calibration is not None)
    model_config = empty_base(config).config
    tokenizer = load_tokenizer(config)
    if "output_dir" not in config.training.model_fields_set:
        training = config.training.model_copy(update={"output_dir": str(output / TRAINING_FOLDER)})
        config = config.model_copy(update={"training": training})
    tasks = _tasks(config, tokenizer)
    calibration = None if config.calibration is None else read_text(config.calibration, tokenizer, model_config)
    text = text or config.calibration
    batches = None if text is None else calibration
    if text is not None and text is not config.calibration:
        batches = read_text(text, tokenizer, model_config)

    name = str(config.model_name_or_path)
    report = ConversionReport(name, output, text=None if text is None else text.path)
    model = load_base(config).eval()
    place(model, pick_device(config.training.use_cpu))
    with progress_bar() as progress:
        if batches is not None:
            report.results["dense"] = measure(model, batches, what="reading", progress=progress)
        seed_everything(config.training.seed)
        started = time.monotonic()
        mixture = convert_ffn_to_experts(
            model,
            config.mixture,
            calibration,
            **({} if config.calibration is None else {"calibration_tokens": config.calibration.max_tokens}),
            progress=progress,
        )
        report.seconds["splitting"] = time.monotonic() - started
        if batches is not None:
            with mixture.disable_adapter():
                report.results["ungated"] = measure(mixture, batches, progress=progress)
            report.results["converted"] = measure(mixture, batches, reconstruction=True, progress=progress)
    if tasks is not None:
        _heal(config, mixture, tokenizer, tasks, report, batches)
    save_converted(mixture, output, tokenizer, report=report.to_dict())
    (output / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    return report


def _refuse(config: RunConfig) -> None:
    """Options that mean nothing here, and models that are no dense ones."""
    assert config.mixture is not None
    kind = config.mixture.expert.kind
    if config.adapter is not None:
        raise ConfigError(
            f"model_name_or_path: {config.adapter} holds a mixture already; give a dense model (train goes on with a "
            "mixture)"
        )
    if not EXPERTS.get(kind).cls.replaces_block:
        raise ConfigError(f"mixture.expert.kind: {kind} adapts linear layers; a conversion needs ffn_partition")
    if config.deepspeed is not None:
        raise ConfigError(
            "deepspeed: convert runs in one process; leave it and data out, and go on with moadapt train on the "
            "converted folder"
        )
    if config.quantized:
        raise ConfigError("load_in_4bit, load_in_8bit: quantised weights cannot be cut; leave them out")
    if config.compare:
        raise ConfigError("compare: convert makes one model; convert once for each mixture")
    check_config(config.mixture)


def _tasks(config: RunConfig, tokenizer: Any) -> list[Task] | None:
    """The tasks to heal on, and a rehearsal of the training without weights; None without data.

    Raises:
        MoadaptError: data or training options that do not fit.
    """
    if config.data is None:
        return None
    rehearsal = empty_mixture(config, as_converted=True)
    encoder_decoder = bool(rehearsal.config.is_encoder_decoder)
    tasks = load_tasks(config.data, tokenizer, is_encoder_decoder=encoder_decoder, seed=config.training.seed)
    for task in tasks:
        note(task.report())
    MultiTaskTrainer(rehearsal, tokenizer, config.data, config.training, tasks=tasks)
    parameter_groups(rehearsal, config.training)
    return tasks


def _heal(
    config: RunConfig,
    mixture: MixtureModel,
    tokenizer: Any,
    tasks: Sequence[Task],
    report: ConversionReport,
    batches: Sequence[dict[str, Tensor]] | None,
) -> None:
    """Train the converted model, and measure it again."""
    started = time.monotonic()
    assert config.data is not None
    trainer = MultiTaskTrainer(mixture, tokenizer, config.data, config.training, tasks=tasks)
    result = trainer.train()
    trainer.close()
    mixture.eval()
    (Path(config.training.output_dir) / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    report.seconds["healing"] = time.monotonic() - started
    report.healing = {"steps": result.global_step, "tokens": result.tokens, "loss": result.loss}
    if batches is not None:
        with progress_bar() as progress:
            report.results["healed"] = measure(mixture, batches, progress=progress)

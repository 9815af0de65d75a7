"""What a run reports: `metrics.jsonl`, accelerate's trackers, and progress on the terminal."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moadapt.errors import ConfigError
from moadapt.train.training_config import TrainingConfig

if TYPE_CHECKING:
    from moadapt.train.routing_pictures import Histogram

METRICS_FILE = "metrics.jsonl"


def check_trackers(names: list[str]) -> None:
    """Check `report_to` before anything is loaded.

    Raises:
        ConfigError: a tracker is unknown to accelerate, or its package is not installed.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(item) for item in get_available_trackers()]
    for name in names:
        if name in available:
            continue
        if name in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"training.report_to: {name!r} is not installed. Installed: {', '.join(available) or '–'}"
            )
        valid = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise ConfigError(f"training.report_to: unknown tracker {name!r}. Valid trackers: {valid}, none")


class Window:
    """Means over the steps since the last log entry.

    Sums and weights are kept apart, so that a per-task loss is a mean over tokens and a step's loss one over steps.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add a mean `value` of `weight` items."""
        self._sums[name] = self._sums.get(name, 0.0) + value * weight
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        """The means; names without weight are left out."""
        return {name: self._sums[name] / weight for name, weight in self._weights.items() if weight > 0}

    def clear(self) -> None:
        """Start the next entry."""
        self._sums.clear()
        self._weights.clear()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self._sums, self._weights = dict(state.get("sums", {})), dict(state.get("weights", {}))


class RunLogger:
    """Writes log entries in the first process; in the others it does nothing.

    Args:
        config: names the folder, the trackers and the run.
        is_main: whether this is the first process.
        total_steps: optimizer steps of the run.
        resumed_step: where the run continues; later entries of `metrics.jsonl` are dropped. None starts a new file.
    """

    def __init__(self, config: TrainingConfig, *, is_main: bool, total_steps: int, resumed_step: int | None) -> None:
        self.is_main = is_main
        self.history: list[dict[str, float]] = []
        self._trackers: list[Any] = []
        self._progress: Progress | None = None
        self._console = Console(stderr=True)
        self._total = total_steps
        if not is_main:
            return
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS_FILE
        kept = (
            [] if resumed_step is None else [entry for entry in read_metrics(folder) if entry["step"] <= resumed_step]
        )
        self._path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        self._trackers = _start_trackers(config, folder)
        self._bar: TaskID | None = None
        self._quiet = config.disable_tqdm
        if not self._quiet and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._progress.start()
            self._bar = self._progress.add_task("training", total=total_steps, completed=resumed_step or 0, note="")
            self._side = self._progress.add_task("evaluating", total=1, visible=False, note="")

    def log(self, values: Mapping[str, float], step: int, *, show: bool = True) -> None:
        """Write one entry to the file, the trackers and, with `show`, the terminal."""
        if not self.is_main:
            return
        entry = {"step": step, "time": round(time.time(), 3), **values}
        self.history.append(dict(entry))
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)
        if show and not self._quiet and self._progress is None:
            names = {"train/loss": "loss", "train/grad_norm": "grad norm", "train/tokens_per_second": "tokens/s"}
            parts = [f"{label} {values[name]:.4g}" for name, label in names.items() if name in values]
            print(f"step {step}/{self._total}  " + "  ".join(parts), file=sys.stderr, flush=True)

    def log_pictures(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        histograms: Mapping[str, Histogram | NDArray[np.float64]],
        step: int,
    ) -> None:
        """Give TensorBoard, where it is a tracker, images of shape (height, width, 3) and histograms."""
        for tracker in self._trackers:
            if tracker.name != "tensorboard":
                continue
            for tag, image in images.items():
                tracker.writer.add_image(tag, image, step, dataformats="HWC")
            for tag, values in histograms.items():
                if isinstance(values, np.ndarray):
                    tracker.writer.add_histogram(tag, values, step)
                    continue
                sums = (sum(values.counts), values.total, values.squares)
                tracker.writer.add_histogram_raw(tag, 0.0, values.edges[-1], *sums, values.edges, values.counts, step)
            tracker.writer.flush()

    def advance(self, step: int, loss: float) -> None:
        """Move the progress bar."""
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=step, note=f"loss {loss:.4f}")

    def side_progress(self, what: str, done: int, total: int) -> None:
        """Show the progress of an evaluation below the bar."""
        if self._progress is not None:
            self._progress.update(
                self._side, description=what, completed=done, total=total, visible=done < total, note=""
            )

    def show(self, item: RenderableType) -> None:
        """Print a table or a line of text."""
        if self.is_main and not self._quiet:
            self._console.print(item)

    def warn(self, text: str) -> None:
        """Print a warning, also where no progress is shown."""
        if self.is_main:
            self._console.print(f"warning: {text}", style="yellow", highlight=False, markup=False)

    def close(self) -> None:
        """Finish the bar and the trackers."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The entries of a run's `metrics.jsonl`; a last line that was cut off by a crash is left out."""
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def _start_trackers(config: TrainingConfig, folder: Path) -> list[Any]:
    if not config.report_to:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PartialState(cpu=config.use_cpu)  # accelerate's loggers ask for it; it joins the process group there is
    torch.set_num_threads(threads)  # which it changes, on a CPU
    options = config.model_dump(mode="json")
    settings = {name: value for name, value in options.items() if isinstance(value, (bool, int, float, str))}
    trackers = []
    for name in config.report_to:
        kind = LOGGER_TYPE_TO_CLASS[name]
        if name == "wandb":
            tracker = kind("moadapt", name=config.tracker_name)
        elif kind.requires_logging_directory:
            tracker = kind(config.tracker_name, str(folder / "logs"))
        else:
            tracker = kind(config.tracker_name)
        tracker.main_process_only = False  # only the first process comes here
        if hasattr(tracker, "start"):
            tracker.start()
        tracker.store_init_configuration(settings)
        trackers.append(tracker)
    return trackers

"""The passes that `moadapt inspect` records: over whole rows, in generation, and over single texts."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moadapt.cli.inspecting import Rows, Subject, task_ids, training_curves

if TYPE_CHECKING:
    from torch import Tensor

    from moadapt.statistics import RoutingStatistics, Trace
    from moadapt.statistics.compare import Selections
    from moadapt.train.encoding import Example
    from moadapt.train.engine import Processes

Progress = Callable[[str, int, int], None]


@dataclass
class Passes:
    """Runs the model over rows.

    Attributes:
        model: a mixture, or a stock model.
        rows: what it reads.
        ids: each task's id; None without tasks.
        tokenizer: decodes, and knows the end tokens.
        batch_size: rows of one pass.
        processes: share the batches.
        progress: moves a bar.
    """

    model: Any
    rows: Rows
    ids: dict[str | None, int] | None
    tokenizer: Any
    batch_size: int
    processes: Processes
    progress: Progress

    def __post_init__(self) -> None:
        from moadapt.model import MixtureModel
        from moadapt.train.collate import Collator
        from moadapt.train.evaluation import end_tokens

        tokenizer = self.tokenizer
        base: Any = self.model.base_model if isinstance(self.model, MixtureModel) else self.model
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.collator = Collator(pad or 0, "right", self.rows.has_encoder)
        if base.generation_config is not None:  # recording reads from here which tokens fill up rows that have ended
            base.generation_config.eos_token_id = end_tokens(tokenizer, base, self.rows.data.eos_token) or None
            base.generation_config.pad_token_id = pad or 0
        arguments = inspect.signature(base.forward).parameters
        self.cheap = {"logits_to_keep": 1} if "logits_to_keep" in arguments and not self.rows.has_encoder else {}

    def _batches(self, what: str, generated: bool = False) -> Iterator[tuple[str | None, list[Example]]]:
        """This process's share, rows of like length together."""
        work = []
        for name, examples in self.rows.examples.items():
            chosen = [example for example in examples if not generated or example.prompt_length > 0]
            chosen.sort(key=lambda example: -self.rows.length(example))
            starts = range(0, len(chosen), self.batch_size)
            work += [(name, chosen[start : start + self.batch_size]) for start in starts]
        share = work[self.processes.rank :: self.processes.world_size]
        for done, batch in enumerate(share):
            self.progress(what, done, len(share))
            yield batch

    def read(self) -> None:
        """A pass over every row."""
        for name, examples in self._batches("reading"):
            self.forward(name, examples)

    def generate(self, max_new_tokens: int) -> None:
        """Greedy answers to every prompt."""
        for name, examples in self._batches("generating", generated=True):
            batch = self.collator.collate_prompts(examples)
            inputs = {key: batch[key].to(self.processes.device) for key in ("input_ids", "attention_mask")}
            self._call(self.model.generate, name, batch, inputs, do_sample=False, max_new_tokens=max_new_tokens)

    def forward(self, task: str | None, examples: Sequence[Example]) -> Any:
        """One pass."""
        batch = self.collator(examples)
        names = ("input_ids", "attention_mask", *(["labels"] if self.rows.has_encoder else []))
        inputs = {key: batch[key].to(self.processes.device) for key in names}
        return self._call(self.model, task, batch, inputs, use_cache=False, **self.cheap)

    def _call(
        self, function: Callable[..., Any], task: str | None, batch: dict[str, Tensor], inputs: Any, **options: Any
    ) -> Any:
        import torch

        from moadapt.model import MixtureModel
        from moadapt.statistics import describing

        device = self.processes.device
        prompt_mask, ids = batch["prompt_mask"].to(device), None
        if self.ids is not None:
            ids = torch.full((prompt_mask.shape[0],), self.ids[task], dtype=torch.int64, device=device)
        with torch.no_grad():
            if isinstance(self.model, MixtureModel):
                return function(**inputs, prompt_mask=prompt_mask, task_ids=ids, **options)
            with describing(prompt_mask, ids):
                return function(**inputs, **options)

    def texts(self, number: int, seed: int) -> list[dict[str, Any]]:
        """Some rows of each task with the gates of their tokens."""
        from moadapt.statistics.texts import gates_of_text, text_budget

        chosen = [
            (name, example)
            for name, examples in self.rows.examples.items()
            for example in random.Random(seed).sample(examples, min(number, len(examples)))
        ]
        num_routers = len(_routers(self.model))
        found = []
        for done, (name, example) in enumerate(chosen):
            self.progress("reading texts", done, len(chosen))
            part = None if self.rows.has_encoder else [1 - prompt for prompt in example.prompt_mask]
            run = lambda name=name, example=example: self.forward(name, [example])  # noqa: E731
            most = text_budget(num_routers, len(chosen))
            found.append(gates_of_text(self.model, run, name or "all", part, self.decode, most))
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, as it is."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _routers(model: Any) -> dict[str, Any]:
    from moadapt.model import MixtureModel
    from moadapt.statistics.stock import find_stock_routers

    return dict(model.injection.routers if isinstance(model, MixtureModel) else find_stock_routers(model))


def record(
    passes: Passes,
    tasks: list[str] | None,
    *,
    vocabulary: bool = False,
    trace: Trace | None = None,
    selections: Selections | None = None,
    compares: bool = False,
    generates: int | None = None,
) -> RoutingStatistics:
    """Record passes over all rows, summed over the processes.

    Args:
        passes: what to run.
        tasks: their names by id.
        vocabulary: count by input token.
        trace: write one.
        selections: keep what was selected, or with `compares` compare with it.
        compares: see above.
        generates: generate so many tokens for each row instead.
    """
    from moadapt.statistics import record_routing

    processes = passes.processes
    with ExitStack() as stack:
        statistics = stack.enter_context(
            record_routing(passes.model, tasks, vocabulary=vocabulary, trace=trace, seed=processes.rank)
        )
        keeping = nullcontext() if selections is None else selections.keeping(passes.model)
        stack.enter_context(selections.comparing(passes.model) if selections is not None and compares else keeping)
        if generates is None:
            passes.read()
        else:
            passes.generate(generates)
    if processes.world_size > 1:
        statistics.reduce(processes.all_sum, lambda tensor: _gathered(tensor, processes))
        if selections is not None and compares:
            sizes = {name: counts.num_experts for name, counts in statistics.routers.items()}
            selections.reduce(processes.all_sum, sizes)
    return statistics


def _gathered(tensor: Tensor, processes: Processes) -> list[Tensor]:
    """The tensors of all processes, by a sum of ones that are zero elsewhere."""
    import torch

    everything = torch.zeros(processes.world_size, *tensor.shape, dtype=tensor.dtype)
    everything[processes.rank] = tensor
    return list(processes.all_sum(everything).unbind(0))


@dataclass(frozen=True)
class Options:
    """How to inspect.

    Attributes:
        batch_size: rows of one pass.
        texts: rows of each task to show as text.
        vocabulary: count by input token.
        generates: longest generated answer; None generates none.
        trace: most decisions to trace; None for none.
    """

    batch_size: int
    texts: int
    vocabulary: bool
    generates: int | None
    trace: int | None


def inspected(
    subject: Subject,
    rows: Rows,
    tokenizer: Any,
    options: Options,
    processes: Processes,
    progress: Progress,
    *,
    folder: Path | None = None,
    selections: Selections | None = None,
    compares: bool = False,
) -> dict[str, Any]:
    """The routing document of one model. The first process writes `routing.parquet` and a trace. Collective.

    Args:
        subject: the model.
        rows: what it reads.
        tokenizer: its base model's.
        options: how.
        processes: share the work.
        progress: moves a bar.
        folder: for what is written; None writes nothing.
        selections: keep what is selected, or with `compares` compare with it.
        compares: see above.

    Raises:
        ConfigError: a model without routers, or that cannot route these rows.
        DataError: tasks that the model does not know.
    """
    from moadapt.statistics import Trace
    from moadapt.statistics.document import build_document
    from moadapt.statistics.table import write_parquet
    from moadapt.statistics.texts import similarities
    from moadapt.train.routing_checks import check_prompts
    from moadapt.train.tasks import Task

    tasks, ids = task_ids(subject, rows)
    model = subject.load()
    check_prompts(model, [Task(name or "", 0, train=examples) for name, examples in rows.examples.items()])
    passes = Passes(model, rows, ids, tokenizer, options.batch_size, processes, progress)
    writes = folder is not None and processes.is_main
    trace = None
    if writes and folder is not None and options.trace is not None:
        trace = Trace(folder / "trace.parquet", options.trace)
    statistics = record(
        passes, tasks, vocabulary=options.vocabulary, trace=trace, selections=selections, compares=compares
    )
    generated = None if options.generates is None else record(passes, tasks, generates=options.generates)
    if not processes.is_main:
        return {}
    data = rows.document()
    if generated is not None:
        decoded = [int(counts.rows[:, :, 1].sum()) for counts in generated.routers.values()]
        data["generated_tokens"] = max(decoded)
    texts = passes.texts(options.texts, seed=0)
    progress("testing tasks", 0, 1)
    document = build_document(
        statistics,
        title=f"Routing of {subject.name}",
        model=subject.describe(),
        data=data,
        generated=generated,
        similarity=similarities(model),
        texts=texts,
        training=training_curves(subject.name, statistics),
        decode=lambda token: passes.decode([token]),
    )
    if writes and folder is not None:
        write_parquet(statistics, folder / "routing.parquet", generated)
    return document

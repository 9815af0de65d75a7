"""`MixtureConfig`: everything that defines a mixture of adapters, but not how it is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails
from typing_extensions import Self

import moadapt.experts
import moadapt.losses
import moadapt.routers
import moadapt.splits  # noqa: F401  (these imports fill the tables of kinds)
from moadapt.per_layer import PerLayerInt
from moadapt.presets import PRESETS, merge_preset
from moadapt.registry import EXPERTS, LOSSES, ROUTERS, Config, KindConfig, OfKind, closest, config_error, problem

Names = list[str] | str
_SHORTHANDS = {"router_aux_loss_coef": "load_balance", "router_z_loss_coef": "router_z"}


class MixtureConfig(Config):
    """A mixture of adapters.

    Attributes:
        preset: name of a published method whose values are the starting point.
        num_experts: N; one value, a list per layer, or a map of patterns. With `expert_unit: module` there is no such
            choice: N is the number of adapted modules that a router rules.
        expert_unit: what is an expert: with `bank` every adapted module has N of its own; with `module` the adapted
            modules of a block are the experts (MiLoRA).
        tasks: names of the tasks in the order of their ids, for kinds that route or transform by task; a run fills in
            those of its data.
        target_modules: what to adapt: a list of names (of a module or of the end of its path), a regular expression
            for the whole path, or `all-linear` (every linear layer but the output head).
        exclude_modules: what to leave alone, as a list of names or a regular expression.
        layers_to_transform: indices of the transformer layers to adapt; all when not given.
        modules_to_save: names of further modules that are trained in full and saved with the adapter.
        expert: kind and options of the experts.
        router: kind and options of the router.
        losses: kinds and options of the auxiliary losses.
        router_aux_loss_coef: shorthand for `{kind: load_balance, coef: ...}` in `losses`.
        router_z_loss_coef: shorthand for `{kind: router_z, coef: ...}` in `losses`.
    """

    preset: str | None = None
    num_experts: PerLayerInt = 8
    expert_unit: Literal["bank", "module"] = "bank"
    tasks: list[str] | None = None
    target_modules: Names = "all-linear"
    exclude_modules: Names | None = None
    layers_to_transform: int | list[int] | None = None
    modules_to_save: list[str] = Field(default_factory=list)
    expert: Annotated[KindConfig, OfKind(EXPERTS)] = Field(default={"kind": "lora"}, validate_default=True)
    router: Annotated[KindConfig, OfKind(ROUTERS)] = Field(default={"kind": "top_k"}, validate_default=True)
    losses: list[Annotated[KindConfig, OfKind(LOSSES)]] = Field(default_factory=list)
    router_aux_loss_coef: float | None = Field(default=None, ge=0.0)
    router_z_loss_coef: float | None = Field(default=None, ge=0.0)

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("preset") is None:
            return data
        name = data["preset"]
        if not isinstance(name, str) or name not in PRESETS:
            return data
        merged = merge_preset(PRESETS[name], data)
        if "losses" not in data:  # a shorthand stands above the preset's loss of that kind
            replaced = {kind for option, kind in _SHORTHANDS.items() if data.get(option) is not None}
            merged["losses"] = [loss for loss in merged.get("losses", []) if loss["kind"] not in replaced]
        return merged

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            valid = list(PRESETS)
            raise ValueError(f"unknown preset{closest(value, valid)} Valid presets: {', '.join(valid)}")
        return value

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _names_or_regex(cls, value: Names | None) -> Names | None:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        elif value is not None and not value:
            raise ValueError("the list is empty")
        return value

    @model_validator(mode="after")
    def _options_fit_together(self) -> Self:
        problems = [
            *self._fill_in_shorthands(),
            *self._fill_in_tasks(),
            *self._unit(),
            *self._granularity(),
            *self._contradictions(),
        ]
        if problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self

    def _fill_in_shorthands(self) -> Iterator[InitErrorDetails]:
        for option, kind in _SHORTHANDS.items():
            coef = getattr(self, option)
            if coef is None:
                continue
            if any(loss.kind == kind for loss in self.losses):
                yield problem(f"{option} and losses both set {kind}; keep one of them", option, value=coef)
                continue
            # Assigned through __dict__: an ordinary assignment would validate, and so run this again.
            self.__dict__["losses"] = [*self.losses, LOSSES.parse({"kind": kind, "coef": coef})]
            self.__dict__[option] = None

    @property
    def needs_tasks(self) -> bool:
        """Whether a kind of this mixture goes by task, so that `tasks` has to be known."""
        return any("num_tasks" in type(part).model_fields for part in (self.router, self.expert))

    def _fill_in_tasks(self) -> Iterator[InitErrorDetails]:
        if self.tasks is None:
            return
        if not self.needs_tasks:
            yield problem("it has no effect on kinds that do not go by task; leave it out", "tasks")
        if len(set(self.tasks)) < len(self.tasks) or not self.tasks:
            yield problem("the names of the tasks must be there, and differ", "tasks")
        for section in ("router", "expert"):
            part = getattr(self, section)
            if "num_tasks" not in type(part).model_fields:
                continue
            if part.num_tasks not in (None, len(self.tasks)):
                yield problem(f"{part.num_tasks}, but tasks names {len(self.tasks)}", section, "num_tasks")
            self.__dict__[section] = part.model_copy(update={"num_tasks": len(self.tasks)})

    def _unit(self) -> Iterator[InitErrorDetails]:
        if self.expert_unit == "bank":
            return
        if "num_experts" in self.model_fields_set and self.num_experts != 1:
            text = "expert_unit: module makes the adapted modules the experts, one each; leave num_experts out"
            yield problem(text, "num_experts", value=self.num_experts)
        self.__dict__["num_experts"] = 1
        if getattr(self.router, "scope", None) == "linear":
            text = "linear with expert_unit: module leaves each router one module, and no choice; use scope: block"
            yield problem(text, "router", "scope")
        if EXPERTS.get(self.expert.kind).cls.replaces_block:
            text = f"module with expert.kind: {self.expert.kind}, which cuts blocks into experts; use expert_unit: bank"
            yield problem(text, "expert_unit")

    def _granularity(self) -> Iterator[InitErrorDetails]:
        router, expert = self.router, self.expert
        if getattr(router, "granularity", None) == "token" and getattr(expert, "mixing", "outputs") == "factors":
            text = (
                "factors merges the experts of a whole sequence, and router.granularity is token; set it to prompt or "
                "task, or use mixing: outputs"
            )
            yield problem(text, "expert", "mixing")

    def _contradictions(self) -> Iterator[InitErrorDetails]:
        kinds = [loss.kind for loss in self.losses]
        for kind in dict.fromkeys(kinds):
            if kinds.count(kind) > 1:
                yield problem(f"{kind} is listed more than once; keep one", "losses")
        num_kept = getattr(self.router, "num_experts_per_tok", None)
        by_bank = self.expert_unit == "bank"
        keeps_all = by_bank and isinstance(num_kept, int) and num_kept == self.num_experts
        selects_all = ROUTERS.get(self.router.kind).cls.selects_all or keeps_all
        keeps_fixed = num_kept is not None and not hasattr(self.router, "threshold")
        for index, loss in enumerate(self.losses):
            loss_class = LOSSES.get(loss.kind).cls
            try:
                loss_class.check(loss, selects_all)
            except ValueError as error:
                yield problem(str(error), "losses", index)
                continue
            if loss_class.steers_share and keeps_fixed:
                text = (
                    f"{loss.kind} steers how many experts are kept, and router.kind: {self.router.kind} always keeps "
                    "num_experts_per_tok; use router.kind: relu or sigmoid_ste, or leave the loss out"
                )
                yield problem(text, "losses", index)
        if by_bank and isinstance(num_kept, int) and isinstance(self.num_experts, int) and num_kept > self.num_experts:
            text = f"{num_kept} exceeds num_experts ({self.num_experts}); lower the one or raise the other"
            yield problem(text, "router", "num_experts_per_tok")


def parse_mixture_config(data: MixtureConfig | dict[str, Any], source: str = "") -> MixtureConfig:
    """A validated config from a mapping (or the config itself).

    Args:
        data: the options.
        source: where they come from, for the error message.

    Raises:
        ConfigError: lists every problem, one per line.
    """
    if isinstance(data, MixtureConfig):
        return data
    try:
        return MixtureConfig.model_validate(data)
    except ValidationError as error:
        raise config_error(error, source) from None

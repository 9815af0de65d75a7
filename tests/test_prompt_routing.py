"""Mixtures with a decision for each prompt or task: against a naive loop, and row by row independent of the rest.

The reference is the same Llama whose targeted linears are loops in float64 over tokens and experts. Each router reads
what its block was called with, pools the prompt of one turn after the other, and every token follows its turn.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import reference
import torch
from kinds import PROMPT_ROUTERS, SCOPES, TASK_ROUTERS
from prompts import LORA, UNITS, batch_of, decisions_seen, ids_of, lm_loss, model_of, of_kind
from test_turns import naive as naive_turns
from tiny import base_model, gradients, randomize_adapter
from torch import Tensor, nn

from moadapt import MixtureModel, get_mixture_model
from moadapt.errors import ConfigError

TOLERANCE = 1e-11


# -- the loop -----------------------------------------------------------------------------------------------------


def mixed_by_factors(gates: list[Tensor], options: dict[str, Any], own: dict[str, Tensor], x_I: Tensor) -> Tensor:
    """s (sum_e g_e B_e) (sum_e g_e A_e) x."""
    down_RI = sum(gate * own["lora_A"][expert] for expert, gate in enumerate(gates))
    up_RO = sum(gate * own["lora_B"][expert] for expert, gate in enumerate(gates))
    return reference.scaling(options, len(up_RO)) * ((down_RI @ x_I) @ up_RO)


@dataclass
class NaiveModel:
    """A base model in float64 whose linears are replaced by loops, with the tensors of a mixture.

    `decisions` holds those of one pass by router: for each sequence, one for each turn (or one for its task).
    """

    model: nn.Module
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    rows: list[str]
    task_ids: list[int] = field(default_factory=list)
    decisions: dict[str, list[list[reference.Decision]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = {name: value.double().clone().requires_grad_() for name, value in self.tensors.items()}
        members: dict[str, list[str]] = {}
        names = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        for name in names:
            if any(key.startswith(f"{name}.experts.") for key in self.tensors):
                members.setdefault(self._router_of(name), []).append(name)
        for router, ruled in members.items():
            where = f"{router}.router" if router == ruled[0] else f"{router}.mixture_router"
            self.model.get_submodule(router).register_forward_pre_hook(self._route(router, where), with_kwargs=True)
            for number, name in enumerate(ruled):
                self._replace(name, router, number if self.config.get("expert_unit") == "module" else None)

    def routed(self) -> list[reference.Routed]:
        """What the losses see of the last pass: turns that a sequence does not have stand there, but do not count."""
        found = []
        for sequences in self.decisions.values():
            most = max(map(len, sequences))
            rows = [turns + turns[:1] * (most - len(turns)) for turns in sequences]
            real = [turn < len(turns) for turns in sequences for turn in range(most)]
            found.append(reference.Routed([decision for row in rows for decision in row], real, len(rows)))
        return found

    def _router_of(self, name: str) -> str:
        scope = self.config["router"].get("scope", "linear")
        layer, part, _ = name.rsplit(".", 2)  # model.layers.0, self_attn | mlp, q_proj
        return name if scope == "linear" else layer if scope == "block" else f"{layer}.{part}"

    def _below(self, prefix: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(f"{prefix}."): value for key, value in self.tensors.items() if key.startswith(f"{prefix}.")
        }

    def _route(self, router: str, where: str) -> Any:
        options, own = self.config["router"], self._below(where)
        naive = reference.NaiveRouter.of(options, self._below(f"{where}.router"))
        pooler, activation = options.get("pooler", "self_attention"), options.get("activation", "gelu")

        def decide(number: int, hidden_SD: Tensor) -> list[reference.Decision]:
            if options["kind"] == "task_table":
                return [reference.by_task(options, own["router.weight"], self.task_ids[number])]
            found = []
            for prompt in naive_turns(self.rows[number]).prompts:
                h_D = reference.pooled(pooler, [hidden_SD[place] for place in prompt], own.get("pooler.weight"))
                h_D = reference.activated(activation, h_D, self._below(f"{where}.activation"))
                found.append(naive(h_D, len(found)))
                assert options["kind"] == "softmax" or naive.margin(found[-1]) > 1e-5, "near tie"
            return found

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_BSD = args[0] if args else kwargs["hidden_states"]
            self.decisions[router] = [decide(number, hidden_SD) for number, hidden_SD in enumerate(hidden_BSD)]

        return hook

    def _replace(self, name: str, router: str, member: int | None) -> None:
        linear, own, options = self.model.get_submodule(name), self._below(f"{name}.experts"), self.config["expert"]

        def of_token(number: int, turn: int | None, x_I: Tensor) -> Tensor:
            y_O = linear.weight @ x_I
            found = self.decisions[router][number]
            turn = 0 if len(found) == 1 or turn is None else turn  # padding follows any turn: nothing reads it
            decision = found[turn]
            if options.get("mixing") == "factors":
                return y_O + mixed_by_factors(decision.gates, options, own, x_I)
            if member is not None:
                decision = reference.Decision(
                    [decision.gates[member]], [decision.selected[member]], [], [], decision.straight_through
                )
            return reference.mixture(x_I[None], [decision], options, own, linear.weight, None)[0]

        def forward(x_BSI: Tensor) -> Tensor:
            turns = [naive_turns(row).turn for row in self.rows]
            rows = [
                torch.stack([of_token(number, turn, x_I) for turn, x_I in zip(turns[number], x_SI, strict=True)])
                for number, x_SI in enumerate(x_BSI)
            ]
            return torch.stack(rows)

        linear.forward = forward


BALANCE = [{"kind": "load_balance", "coef": 0.3, "count": "argmax"}]
MANY = [
    {"kind": "load_balance", "coef": 0.3, "count": "argmax", "level": "sequence"},
    {"kind": "router_z", "coef": 0.05},
    {"kind": "importance", "coef": 0.2},
]


CASES = {f"{name}-{unit}": of_kind(name, unit, losses=BALANCE) for name in PROMPT_ROUTERS for unit in UNITS} | {
    "milora_2-attention": of_kind("milora_1", "module", ["ffn", "attention"]),
    "milora_1-linear": of_kind("milora_1", scope="linear"),
    "milora_3-losses": of_kind("milora_3", "module", losses=MANY),
    "softmax-hydra": of_kind("prompt_softmax_mean", expert={**LORA, "shared_down": True}),
    "sigmoid-malora": of_kind(
        "prompt_sigmoid_last", expert={"kind": "malora", "r": 3, "shared_r": 5, "lora_dropout": 0.0}
    ),
    "smear": of_kind("prompt_smear", expert={**LORA, "mixing": "factors"}),
    "task_table-bank": of_kind("task_table_softmax", losses=BALANCE),
    "task_table-module": of_kind("task_table_mean", "module"),
    "task_table-factors": of_kind("task_table_softmax", expert={**LORA, "mixing": "factors"}),
}
BATCHES = {"instructions": ["uuuaap", "uaaaaa"], "conversations": ["uuauaa", "uuaapp", "ppuuaa"]}
PLAIN = ["milora_3-module", "milora_1-bank", "prompt_softmax_mean-bank", "smear", "task_table-bank"]


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "conversations") for name in CASES), *((name, "instructions") for name in PLAIN)]
)
def test_llama_equals_the_loop(name: str, kind: str) -> None:
    config, rows = CASES[name], BATCHES[kind]
    inputs = batch_of(rows)
    base = base_model(dtype=torch.float64)
    model = get_mixture_model(copy.deepcopy(base), config).train()
    randomize_adapter(model)
    task_ids = [2, -1 if config["router"].get("unknown_task") else 0, 2][: len(rows)]
    naive = NaiveModel(base.requires_grad_(False), config, model.adapter_state_dict(), rows, task_ids)
    prompt_mask, labels = inputs.pop("prompt_mask"), inputs["labels"]
    real = inputs["attention_mask"].bool()

    want_logits = naive.model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    want = lm_loss(want_logits, labels)
    for item in config.get("losses", []):
        options = {key: value for key, value in item.items() if key not in ("kind", "coef")}
        want = want + item["coef"] * getattr(reference, item["kind"])(naive.routed(), **options)
    want.backward()

    # The labels say which tokens are prompts; so does the mask, which is given on the second pass.
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        more = {"prompt_mask": prompt_mask} if checkpointing else {}
        output = model(**inputs, **more, task_ids=torch.tensor(task_ids), use_cache=False)
        loss = lm_loss(output.logits, labels) + output.aux_loss
        loss.backward()
        reference.close(output.logits[real], want_logits[real], TOLERANCE, "logits")
        reference.close(loss, want, TOLERANCE, "loss")
        got = gradients(model)
        assert got.keys() == naive.tensors.keys()
        for key, grad in got.items():
            wanted = naive.tensors[key].grad
            reference.close(grad, torch.zeros_like(grad) if wanted is None else wanted, TOLERANCE, key)


# -- a row and the rest of the batch ------------------------------------------------------------------------------


@torch.no_grad()
def real_outputs(
    model: MixtureModel, rows: list[str], ids: list[Tensor], tasks: list[int], fill: int = 0
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """For each row its logits and, by router, the gates and router logits that each of its real tokens follows."""
    inputs = batch_of(rows, ids, fill)
    real = inputs["attention_mask"].bool()
    inputs.pop("labels")
    with decisions_seen(model) as seen:
        logits = model(**inputs, task_ids=torch.tensor(tasks)).logits
    values = {}
    for name, routing in seen.items():
        tokens = routing.per_token(real.numel())
        values[name] = torch.cat([tokens.weights_TN, tokens.logits_TN], -1).unflatten(0, real.shape)
    return [(logits[i, real[i]], {name: value[i, real[i]] for name, value in values.items()}) for i in range(len(rows))]


def same(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], what: str) -> None:
    """Up to the shorter one of both."""
    length = min(len(got[0]), len(want[0]))
    reference.close(got[0][:length], want[0][:length], TOLERANCE, f"{what}: logits")
    for name, gates in want[1].items():
        reference.close(got[1][name][:length], gates[:length], TOLERANCE, f"{what}: {name}")


TABLE = [
    (name, unit, scope)
    for name in (*PROMPT_ROUTERS, *TASK_ROUTERS)
    for unit in UNITS
    for scope in SCOPES
    if (unit, scope) != ("module", "linear")
]


@pytest.mark.parametrize(("name", "unit", "scope"), TABLE, ids=str)
def test_padding_batch_mates_and_later_tokens(name: str, unit: str, scope: Any) -> None:
    model, ids, tasks = model_of(name, unit, scope), ids_of(9, 4, 6), [0, 2, 1]
    rows = ["uuauaa", "uua", "uuuaa"]
    alone = [real_outputs(model, [rows[i]], [ids[i]], [tasks[i]])[0] for i in range(3)]
    by_row = {str([value[0].tolist() for value in gates.values()]) for _, gates in alone}
    assert len(by_row) > 1, "the rows have to be routed differently for this test to mean anything"
    padded = [f"{row:p>8}" for row in rows], [f"{row:p<7}" for row in rows]
    for letters, fill in zip(padded, (7, 0), strict=True):
        for number, got in enumerate(real_outputs(model, letters, ids, tasks, fill)):
            same(got, alone[number], f"{letters[number]}")
    order = [2, 0]
    mixed = real_outputs(model, ["ppuuuaa", "uuauaap"], [ids[i] for i in order], [tasks[i] for i in order])
    for got, number in zip(mixed, order, strict=True):
        same(got, alone[number], "other batch mates and padding")
    for later in ("uuauaaaaa", "uuauaauua", "uuau"):
        same(real_outputs(model, [later], ids[:1], tasks[:1])[0], alone[0], f"continued as {later}")


@pytest.mark.parametrize("name", ["milora_3", "prompt_relu_max"])
def test_the_prompt_counts_to_its_last_token(name: str) -> None:
    """A prompt that is longer by a token is routed anew; the same token as an answer is not looked at."""
    model, (ids,) = model_of(name), ids_of(5)
    (_, short), (_, long), (_, answered) = (
        real_outputs(model, [row], [ids], [0])[0] for row in ("uuuu", "uuuuu", "uuuua")
    )
    for router, gates in short.items():
        assert (long[router][0] - gates[0]).abs().max() > 1e-3
        reference.close(answered[router][4], gates[0], TOLERANCE, router)


def test_without_labels_or_mask_everything_is_prompt() -> None:
    model, inputs = model_of("milora_3"), batch_of(["uuuu", "puuu"])
    inputs.pop("labels")
    with torch.no_grad():
        want = model(**inputs).logits
        inputs.pop("prompt_mask")
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8], ids=str)
def test_masks_of_numbers_are_masks(dtype: torch.dtype) -> None:
    model, inputs = model_of("milora_3"), batch_of(["uuaa", "puua"])
    with torch.no_grad():
        want = model(**inputs).logits
        inputs["prompt_mask"] = inputs["prompt_mask"].to(dtype)
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize(("rows", "length"), [(2, 3), (3, 4)])
def test_a_mask_of_another_shape_is_refused(rows: int, length: int) -> None:
    model, inputs = model_of("milora_3"), batch_of(["uuaa", "puua"])
    inputs["prompt_mask"] = torch.ones(rows, length).bool()
    message = rf"prompt_mask: its shape is \({rows}, {length}\), and that of the inputs \(2, 4\)"
    with pytest.raises(ConfigError, match=message):
        model(**inputs)


def test_training_text_without_a_prompt_is_refused() -> None:
    model, inputs = model_of("milora_3"), batch_of(["uuaa", "aaaa"])
    inputs.pop("prompt_mask")
    with pytest.raises(ConfigError, match="row 1 of the batch has no prompt token"):
        model(**inputs)

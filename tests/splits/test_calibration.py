"""Calibration: what is recorded, against a naive run of one text at a time, and that the model stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import VOCAB, base_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.calibration import collect
from moadapt.errors import DataError
from moadapt.splits import BlockSample

# family: (blocks, the name of the down-projection in a block); OPT's blocks have no module of their own
BLOCKS = {
    "llama": (["model.layers.0.mlp", "model.layers.1.mlp"], "down_proj"),
    "gpt2": (["transformer.h.0.mlp", "transformer.h.1.mlp"], "c_proj"),
    "opt": (["model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"], "../fc2"),
    "t5": (["encoder.block.1.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"], "wo"),
}
FAMILIES = list(BLOCKS)
LENGTHS = [3, 6, 4, 5, 2, 6]
ANSWERS = [2, 3, 4, 2, 3, 4]


def modules(model: PreTrainedModel, family: str) -> dict[str, dict[str, Any]]:
    """The arguments of `collect` that say where the blocks are."""
    names, down = BLOCKS[family]
    down_names = {name: name.replace("fc1", "fc2") if family == "opt" else f"{name}.{down}" for name in names}
    return {
        "blocks": {name: model.get_submodule(name) for name in names},
        "down_modules": {name: model.get_submodule(down_name) for name, down_name in down_names.items()},
        "streams": {name: "encoder" if name.startswith("encoder") else "decoder" for name in names},
    }


def texts(family: str, lengths: list[int] | None = None) -> list[dict[str, Tensor]]:
    """Token ids of one text each, and T5's answers."""
    generator = torch.Generator().manual_seed(9)
    made = []
    for length, answer in zip(lengths or LENGTHS, ANSWERS, strict=False):
        text = {"input_ids": torch.randint(3, VOCAB, (1, length), generator=generator)}
        if family == "t5":
            text["labels"] = torch.randint(3, VOCAB, (1, answer), generator=generator)
        made.append(text)
    return made


def padded(rows: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    """One batch of several texts."""

    def stack(tensors: list[Tensor], value: int, side: str) -> Tensor:
        longest = max(tensor.shape[1] for tensor in tensors) + 1
        gaps = [longest - tensor.shape[1] for tensor in tensors]
        pads = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
        pairs = zip(tensors, pads, strict=True)
        return torch.cat([nn.functional.pad(tensor, pad, value=value) for tensor, pad in pairs])

    ids = [row["input_ids"] for row in rows]
    batch = {"input_ids": stack(ids, 0, side), "attention_mask": stack([torch.ones_like(i) for i in ids], 0, side)}
    if "labels" in rows[0]:
        batch["labels"] = stack([row["labels"] for row in rows], -100, "right")
    return batch


def close(one: dict[str, BlockSample], other: dict[str, BlockSample]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        for field in ("inputs_TD", "importance_CF"):
            first, second = getattr(one[name], field), getattr(other[name], field)
            torch.testing.assert_close(first, second, rtol=2e-4, atol=2e-5 * float(second.abs().max()), msg=name)


# -- against a naive run ------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A down-projection whose input is h * (1 + e) with e = 0: the gradient of e is h * dL/dh."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.factors = inner, []
        self.weight = inner.weight  # T5 looks at its dtype

    def forward(self, h: Tensor) -> Tensor:
        factor = torch.zeros(h.shape, dtype=h.dtype, requires_grad=True)
        self.factors.append(factor)
        return self.inner(h * (1 + factor))


def naive(family: str, rows: list[dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """By block, inputs (T, D) and |h dL/dh| (T, F) of all texts one after the other, in float64."""
    model = base_model(family, torch.float64)
    where = modules(model, family)
    seen: dict[str, list[Tensor]] = {name: [] for name in where["blocks"]}
    wrapped = {}
    for name, module in where["down_modules"].items():
        wrapped[name] = Scaled(module)
        path = next(path for path, candidate in model.named_modules() if candidate is module)
        model.set_submodule(path, wrapped[name])
    for name, module in where["blocks"].items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach().flatten(0, -2)))
    importance: dict[str, list[Tensor]] = {name: [] for name in wrapped}
    for row in rows:
        logits = model(**row).logits[0]
        ids = row["labels"][0] if family == "t5" else row["input_ids"][0, 1:]
        loss = sum(
            (torch.logsumexp(logits[position], 0) - logits[position, token] for position, token in enumerate(ids)),
            torch.zeros((), dtype=torch.float64, requires_grad=True),
        )
        gradients = torch.autograd.grad(loss, [scaled.factors[-1] for scaled in wrapped.values()])
        for name, gradient in zip(wrapped, gradients, strict=True):
            importance[name].append(gradient.flatten(0, -2).abs())
    return {name: (torch.cat(seen[name]), torch.cat(importance[name])) for name in seen}


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_importance_against_one_text_at_a_time(family: str) -> None:
    rows = texts(family)
    model = base_model(family)
    batches = [padded(rows[:4], "right"), padded(rows[4:], "right")]
    samples = collect(model, batches=batches, inputs=True, gradients=True, **modules(model, family))
    for name, (inputs_TD, importance_TF) in naive(family, rows).items():
        got = samples[name]
        assert got.inputs_TD is not None
        assert got.importance_CF is not None
        assert got.inputs_TD.dtype == got.importance_CF.dtype == torch.float32
        torch.testing.assert_close(got.inputs_TD.double(), inputs_TD, rtol=1e-4, atol=1e-5)
        wanted = importance_TF.mean(0, keepdim=True)
        assert wanted.max() > 1e-3
        torch.testing.assert_close(got.importance_CF.double(), wanted, rtol=1e-3, atol=1e-5 * wanted.max().item())


def test_importance_is_averaged_within_each_cluster_of_texts() -> None:
    """Texts of one token over and over, two tokens: the two clusters are plain to see."""
    rows = [{"input_ids": torch.full((1, length), 7 + 20 * (index % 2))} for index, length in enumerate(LENGTHS)]
    model = base_model("llama")
    batches = [padded(rows[:3], "right"), padded(rows[3:], "right")]
    samples = collect(model, batches=batches, inputs=False, gradients=True, num_clusters=2, **modules(model, "llama"))
    token_text = torch.tensor([index for index, length in enumerate(LENGTHS) for _ in range(length)])
    for name, (_, importance_TF) in naive("llama", rows).items():
        means = [importance_TF[token_text % 2 == parity].mean(0) for parity in (0, 1)]
        got = samples[name].importance_CF
        assert samples[name].inputs_TD is None
        assert got is not None
        wanted = torch.stack(sorted(means, key=lambda mean: (mean - got[0]).abs().sum().item()))
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("labelled", ["all", "answers"])
def test_labels_say_which_tokens_the_loss_counts(labelled: str) -> None:
    model = base_model("llama")
    batch = padded(texts("llama"), "left")
    where = modules(model, "llama")
    plain = collect(model, batches=[batch], inputs=True, gradients=True, **where)
    labels = batch["input_ids"].clone()  # padding is labelled with its token id
    if labelled == "answers":
        labels[:, :5] = -100
    given = collect(model, batches=[{**batch, "labels": labels}], inputs=True, gradients=True, **where)
    if labelled == "all":
        close(given, plain)
    else:
        for name in plain:
            assert torch.equal(given[name].inputs_TD, plain[name].inputs_TD)
            assert not torch.allclose(given[name].importance_CF, plain[name].importance_CF)


# -- invariance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [100, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_batches_change_nothing(family: str, max_tokens: int) -> None:
    rows = texts(family)
    model = base_model(family)
    ways = [
        rows,
        [padded(rows, "right")],
        [padded(rows[:2], "right"), padded(rows[2:], "right")],
    ]
    if family != "t5":  # its attention is given padding on the right
        ways.append([padded(rows[:3], "left"), padded(rows[3:], "left")])
    options: dict[str, Any] = {"inputs": True, "gradients": True, "num_clusters": 2, "max_tokens": max_tokens}
    made = [collect(model, batches=way, **options, **modules(model, family)) for way in ways]
    for name, stream in modules(model, family)["streams"].items():
        tokens = sum(ANSWERS) if family == "t5" and stream == "decoder" else sum(LENGTHS)
        inputs_TD = made[0][name].inputs_TD
        assert inputs_TD is not None
        assert len(inputs_TD) == min(tokens, max_tokens)
    for other in made[1:]:
        close(other, made[0])


def test_the_draw_is_uniform_and_without_repetition() -> None:
    """Token ids 3 to 36 once each: every one is kept about equally often. 300 draws of 10 of 34: 88 +- 8 each."""
    model = base_model("llama", max_position_embeddings=64)
    block = nn.Identity()
    model.model.embed_tokens = nn.Sequential(model.model.embed_tokens, block)
    rows = [{"input_ids": torch.arange(3 + 17 * half, 20 + 17 * half)[None]} for half in range(2)]
    table = model.model.embed_tokens[0].weight.detach()
    count = torch.zeros(VOCAB)
    for seed in range(300):
        sample = collect(model, {"block": block}, rows, inputs=True, max_tokens=10, seed=seed)["block"]
        assert sample.inputs_TD is not None
        found = [int((table - row).abs().sum(1).argmin()) for row in sample.inputs_TD]
        assert len(set(found)) == 10
        count[found] += 1
    assert count[3:37].min() > 50
    assert count[3:37].max() < 130
    assert count.sum() == 3000


# -- the model stays as it was ------------------------------------------------------------------------------------


def state(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if parameter.grad is None else parameter.grad.sum().item() for parameter in model.parameters()],
        "hooks": sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_also_after_an_error(fails: bool) -> None:
    model = base_model("llama")
    model.train()
    model.model.layers[0].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
        if index % 3 == 1:
            parameter.grad = torch.full_like(parameter, 0.5)
    before, generator = state(model), torch.get_rng_state()
    modes: list[bool] = []

    def progress(done: int, todo: int) -> None:
        modes.extend(module.training for module in model.modules())
        if fails and done == 3:
            raise RuntimeError("stopped")

    options: dict[str, Any] = {"inputs": True, "gradients": True, "num_clusters": 2, "progress": progress}
    where = modules(model, "llama")
    if fails:
        with pytest.raises(RuntimeError, match="stopped"):
            collect(model, batches=texts("llama"), **options, **where)
    else:
        collect(model, batches=texts("llama"), **options, **where)
    assert not any(modes)
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_progress_counts_both_passes() -> None:
    model, seen = base_model("llama"), []
    collect(
        model,
        batches=texts("llama", [3, 4]),
        inputs=True,
        gradients=True,
        progress=lambda done, todo: seen.append((done, todo)),
        **modules(model, "llama"),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_frozen_model_in_low_precision(dtype: torch.dtype) -> None:
    model = base_model("llama", dtype)
    model.requires_grad_(False)
    samples = collect(model, batches=texts("llama"), inputs=True, gradients=True, **modules(model, "llama"))
    for sample in samples.values():
        assert sample.inputs_TD is not None
        assert sample.importance_CF is not None
        assert sample.inputs_TD.dtype == torch.float32
        assert (sample.importance_CF > 0).all()


def test_what_cannot_be_done_is_refused() -> None:
    model = base_model("llama")
    where = modules(model, "llama")
    with pytest.raises(DataError, match=r"no token reached model\.layers\.0\.mlp"):
        collect(model, batches=[], inputs=True, **where)
    nothing = {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.zeros(1, 3, dtype=torch.long)}
    with pytest.raises(DataError, match="no token reached"):
        collect(model, batches=[nothing], inputs=True, **where)
    with pytest.raises(DataError, match="2 texts for 3 text clusters"):
        collect(model, batches=texts("llama", [3, 4]), inputs=False, gradients=True, num_clusters=3, **where)
    other = {"blocks": {"x": nn.Identity()}, "down_modules": {"x": nn.Identity()}}
    with pytest.raises(DataError, match="no token reached x"):
        collect(model, batches=texts("llama"), inputs=False, gradients=True, **other)
    t5 = base_model("t5")
    with pytest.raises(DataError, match="needs texts with an answer"):
        collect(t5, batches=texts("llama"), inputs=True, **modules(t5, "t5"))

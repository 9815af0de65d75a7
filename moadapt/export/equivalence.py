"""Does the exported checkpoint compute what the converted model computes? Both in fp32, on the same text.

The weights are the same, but sums run in another order, so scores differ in their last bits. Where two experts' scores,
or a score and a threshold, are equal to within that, the two models may choose differently, and their logits from that
token on differ by more than rounding. Such near ties are found by routing the same input with a little noise on the
router's weights; a difference above the bound that no near tie explains is an error.

Shapes: B batch, S sequence, V vocabulary, D hidden size, P positions that are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.ffn import StackedExperts
from moadapt.layer import RouterSite
from moadapt.model import MixtureModel
from moadapt.routing import current_context

Batch = dict[str, Tensor]
RELATIVE_BOUND = 1e-5
"""Largest difference of a logit in an exact export, as a share of the largest logit (and no less than of 1)."""
_NOISE, _DRAWS = 2e-5, 4
_NEW_TOKENS = 16


@dataclass
class Reference:
    """What the converted model computed.

    Attributes:
        batches: the input; `attention_mask` is always there.
        random: whether it is random tokens for want of text.
        logits: fp32 (P, V) of each batch, real positions only.
        tied: bool (B, S) of each batch: a router was at a near tie here or before, in the same row.
        largest: the largest |score| of each router.
        prompts: (B, S) int64.
        generated: the greedy continuation of the prompts, with them.
        firm: bool, of every generated token whether the next one is chosen without a near tie, of logits or routers.
    """

    batches: list[Batch]
    random: bool
    logits: list[Tensor] = field(default_factory=list)
    tied: list[Tensor] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=dict)
    prompts: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    generated: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    firm: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool))


@torch.no_grad()
def run_reference(model: MixtureModel, text: Sequence[Batch] | None, max_tokens: int) -> Reference:
    """Run the converted model in fp32 and evaluation mode, and leave it as it was.

    Args:
        model: the converted model.
        text: batches with `input_ids` and maybe `attention_mask`, (B, S) int64; None takes random tokens.
        max_tokens: how many tokens to use, at most (at least one batch).
    """
    reference = Reference(_chosen(model, text, max_tokens), random=not text)
    with in_fp32(model):
        for batch in reference.batches:
            mask_BS = batch["attention_mask"].bool()
            logits_BSV, tied_BS = _watched(model, _inputs(model.base_model, batch), mask_BS, reference.largest)
            reference.logits.append(logits_BSV[mask_BS].float().cpu())
            reference.tied.append(tied_BS)
        reference.prompts = _prompts(reference.batches)
        reference.generated = _generate(model, reference.prompts)
        reference.firm = _firm(model, reference)
    return reference


def _firm(model: MixtureModel, reference: Reference) -> Tensor:
    """See `Reference.firm`."""
    ids_BS = reference.generated
    inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    if model.base_model.config.is_encoder_decoder:
        inputs = {"input_ids": reference.prompts, "decoder_input_ids": ids_BS}
    logits_BSV, tied_BS = _watched(model, inputs, torch.ones_like(ids_BS, dtype=torch.bool), {})
    best_BS2 = logits_BSV.float().topk(2, dim=-1).values.cpu()
    bound = RELATIVE_BOUND * max(1.0, float(best_BS2.abs().max()))
    return (best_BS2[..., 0] - best_BS2[..., 1] > 10 * bound) & ~tied_BS


@torch.no_grad()
def compare(reference: Reference, exported: PreTrainedModel, tolerance: float = RELATIVE_BOUND) -> dict[str, Any]:
    """Run the exported model on the same input.

    Args:
        reference: what the converted model computed.
        exported: the reloaded model, fp32, in evaluation mode.
        tolerance: as `RELATIVE_BOUND`.

    Returns:
        The numbers of the report. `unexplained_positions` counts those above the bound that no near tie explains.
    """
    largest, total, size, same, tokens = 0.0, 0.0, 0.0, 0, 0
    differences = []
    for batch, want_PV in zip(reference.batches, reference.logits, strict=True):
        got_PV = exported(**_inputs(exported, batch)).logits[batch["attention_mask"].bool()].float().cpu()
        difference_PV = (got_PV - want_PV).abs()
        differences.append(difference_PV.amax(-1).nan_to_num(nan=torch.inf))
        largest = max(largest, float(differences[-1].max()))
        total += float(difference_PV.double().sum())
        size = max(size, float(want_PV.abs().max()))
        same += int((got_PV.argmax(-1) == want_PV.argmax(-1)).sum())
        tokens += want_PV.shape[0]
    bound = tolerance * max(1.0, size)
    above = unexplained = 0
    for batch, difference_P, tied_BS in zip(reference.batches, differences, reference.tied, strict=True):
        above_P = difference_P > bound
        above += int(above_P.sum())
        unexplained += int((above_P & ~tied_BS[batch["attention_mask"].bool().cpu()]).sum())
    generated = _generate(exported, reference.prompts).cpu()
    return {
        "tokens": tokens,
        "text": "random tokens" if reference.random else "given text",
        "max_logit_difference": largest,
        "mean_logit_difference": total / max(1, tokens * reference.logits[0].shape[-1]),
        "max_logit": size,
        "bound": bound,
        "positions_above_bound": above,
        "unexplained_positions": unexplained,
        "argmax_agreement": same / max(1, tokens),
        "generated_tokens": int(reference.generated.numel() - reference.prompts.numel()),
        "generation_equal": torch.equal(generated, reference.generated.cpu()),
        "generation_unexplained": _unexplained(generated, reference),
    }


def _unexplained(generated_BS: Tensor, reference: Reference) -> bool:
    """Whether generated tokens differ where no near tie explains it."""
    want_BS = reference.generated.cpu()
    length = min(want_BS.shape[1], generated_BS.shape[1])
    for row, (got_S, want_S) in enumerate(zip(generated_BS[:, :length], want_BS[:, :length], strict=True)):
        different = (got_S != want_S).nonzero().flatten()
        if len(different) and bool(reference.firm[row, int(different[0]) - 1]):
            return True
    return False


@contextmanager
def in_fp32(model: MixtureModel) -> Iterator[None]:
    """The model in fp32 and evaluation mode for the time of the `with` block; afterwards as it was, bit for bit."""
    training = {name: module.training for name, module in model.named_modules()}
    changed: list[tuple[Tensor, torch.dtype]] = []
    banks = [item.layer.experts for item in model.injection.replacements]
    folded = [bank.stacked() if bank.config.lora is not None else None for bank in banks]
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32 and tensor.dtype != torch.float64:
            changed.append((tensor, tensor.dtype))
            tensor.data = tensor.data.float()  # half precision to fp32 and back rounds nothing
    if changed:
        _renew_rotary(model)
    for bank, experts in zip(banks, folded, strict=True):
        if experts is not None:  # LoRA folded into half-precision weights: rounded as in the model that is exported
            bias = None if experts.in_bias_NP is None else experts.in_bias_NP.float()
            wide = replace(experts, in_NPD=experts.in_NPD.float(), out_NMD=experts.out_NMD.float(), in_bias_NP=bias)
            vars(bank)["stacked"] = partial(_same, wide)
    model.eval()
    try:
        yield
    finally:
        for bank in banks:
            vars(bank).pop("stacked", None)
        for tensor, dtype in changed:
            tensor.data = tensor.data.to(dtype)
        for bank in banks:
            bank._folded = None  # it knows tensors by their addresses, which have changed hands
        for name, module in model.named_modules():
            module.training = training[name]


def _same(experts: StackedExperts) -> StackedExperts:
    return experts


def _noisy(router: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Let the router have slightly other weights, a few times, and its own again at the end."""
    own = {name: parameter.data for name, parameter in router.named_parameters()}
    try:
        for _ in range(_DRAWS):
            draw = {
                name: torch.randn(tensor.shape, generator=generator).to(tensor)
                * _NOISE
                * tensor.square().mean().sqrt().clamp(min=0.05)
                for name, tensor in own.items()
            }
            for sign in (1.0, -1.0):
                for name, parameter in router.named_parameters():
                    parameter.data = own[name] + sign * draw[name]
                yield
    finally:
        for name, parameter in router.named_parameters():
            parameter.data = own[name]


def _renew_rotary(model: nn.Module) -> None:
    """`model.to(bfloat16)` rounds the frequencies of rotary embeddings, which loading in bfloat16 does not."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if "RotaryEmbedding" in type(module).__name__ and config is not None:
            for name, buffer in type(module)(config=config).named_buffers():
                module.get_buffer(name).data.copy_(buffer)


def _chosen(model: MixtureModel, text: Sequence[Batch] | None, max_tokens: int) -> list[Batch]:
    """The batches to run, on the model's device, with a mask."""
    device = model.base_model.device
    if not text:
        vocabulary = model.base_model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (4, 32), generator=generator).to(device)
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    chosen: list[Batch] = []
    for batch in text:
        ids = batch["input_ids"].to(device)
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.to(device)
        left = max_tokens - sum(int(other["attention_mask"].sum()) for other in chosen)
        rows = int((mask.sum(1).cumsum(0) <= left).sum())
        if rows == 0 and chosen:
            break
        keep = max(1, rows)
        chosen.append({"input_ids": ids[:keep], "attention_mask": mask[:keep]})
        if rows < ids.shape[0]:
            break
    return chosen


def _inputs(model: PreTrainedModel, batch: Batch) -> Batch:
    """An encoder-decoder reads the same tokens on both sides."""
    return batch | {"decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else batch


def _prompts(batches: Sequence[Batch]) -> Tensor:
    """The beginning of up to two rows that begin with real tokens (of the first row's last tokens, if none does)."""
    first = batches[0]
    ids, mask = first["input_ids"], first["attention_mask"].bool()
    length = min(8, ids.shape[1])
    whole = mask[:, :length].all(1)
    if bool(whole.any()):
        return ids[whole][:2, :length]
    return ids[:1][mask[:1]][-length:].unsqueeze(0)


def _generate(model: Any, prompts_BS: Tensor) -> Tensor:
    ids: Tensor = model.generate(
        input_ids=prompts_BS,
        attention_mask=torch.ones_like(prompts_BS),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        num_beams=1,
    )
    return ids


def _watched(model: MixtureModel, inputs: Batch, mask_BS: Tensor, largest: dict[str, float]) -> tuple[Tensor, Tensor]:
    """One pass, with an eye on the routers.

    Args:
        model: in fp32.
        inputs: of the pass.
        mask_BS: bool, real tokens (of the decoder).
        largest: the largest |score| of each router so far; updated.

    Returns:
        Logits (B, S, V), and bool (B, S): a router was at a near tie at this token or before, in the same row.
    """
    tied_BS = torch.zeros(mask_BS.shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)

    def look(site: RouterSite, args: tuple[Any, ...], routing: Any) -> None:
        rows_TD = args[0].reshape(-1, args[0].shape[-1])
        largest[site.name] = max(largest.get(site.name, 0.0), float(routing.logits_TN.abs().max()))
        changed_T = torch.zeros(rows_TD.shape[0], dtype=torch.bool, device=rows_TD.device)
        for _ in _noisy(site.router, generator):
            selected_TN = site.router(rows_TD, current_context()).selected_TN
            changed_T |= (selected_TN != routing.selected_TN).any(-1)
        if site.stream == "encoder":  # whatever is decoded reads it
            tied_BS[:, 0] |= changed_T.view(tied_BS.shape[0], -1).any(1).cpu()
        else:
            tied_BS.logical_or_(changed_T.view(tied_BS.shape).cpu() & mask_BS.cpu())

    with ExitStack() as stack:
        for site in model.injection.routers.values():
            stack.callback(site.register_forward_hook(look).remove)
        logits_BSV: Tensor = model(**inputs).logits
    return logits_BSV, tied_BS.cumsum(1) > 0

"""What a router is told about a pass: padding, prompt, tasks, phase, batch size; in training and generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import batch, mixture_model

from moadapt import MixtureModel
from moadapt.errors import ConfigError
from moadapt.routing import RoutingContext, current_context
from moadapt.turns import Turns

CONFIG = {"num_experts": 4, "expert": {"kind": "lora", "r": 2}, "router": {"kind": "top_k", "scope": "block"}}


@contextmanager
def spying(model: MixtureModel) -> Iterator[list[tuple[str, RoutingContext]]]:
    """(router name, context) of every routing inside the block."""
    seen: list[tuple[str, RoutingContext]] = []
    handles = [
        site.router.register_forward_hook(lambda module, args, output, name=name: seen.append((name, args[1])))
        for name, site in model.injection.routers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_masks_and_ids_reach_every_router() -> None:
    model, inputs = mixture_model(CONFIG), batch()
    inputs["attention_mask"][1, 4:] = 0
    prompt, tasks = torch.zeros(2, 6, dtype=torch.bool), torch.tensor([3, 1])
    prompt[:, :2] = True
    with spying(model) as seen:
        model(**inputs, prompt_mask=prompt, task_ids=tasks)
    assert [name for name, _ in seen] == ["model.layers.0", "model.layers.1"]
    for _, context in seen:
        assert context is seen[0][1], "one context per pass"
        assert torch.equal(context.padding_masks["decoder"], inputs["attention_mask"].bool())
        assert torch.equal(context.prompt_masks["decoder"], prompt)
        assert torch.equal(context.task_ids_B, tasks)
        assert (context.phase, context.batch_size) == ("prefill", 2)


@pytest.mark.parametrize("how", ["keyword", "positional", "embeddings"])
def test_however_the_model_is_called(how: str) -> None:
    model, inputs = mixture_model(CONFIG), batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"].clone()
    mask[0, 5] = 0
    with spying(model) as seen:
        if how == "keyword":
            model(input_ids=ids, attention_mask=mask)
        elif how == "positional":
            model(ids, mask)
        else:
            model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    assert torch.equal(seen[0][1].padding_masks["decoder"], mask.bool())
    assert seen[0][1].batch_size == 2


def test_without_a_mask_nothing_is_guessed_from_ids() -> None:
    model = mixture_model(CONFIG)
    ids = torch.zeros(2, 4, dtype=torch.int64)  # all of them the padding id
    with spying(model) as seen:
        model(input_ids=ids)
    context = seen[0][1]
    assert context.padding_masks == {}
    assert context.prompt_masks == {}
    assert context.task_ids_B is None


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_prefills_once_and_then_decodes(beams: int) -> None:
    model, inputs = mixture_model(CONFIG).eval(), batch()
    inputs["attention_mask"][1, :2] = 0
    prompt = inputs["attention_mask"].bool()
    with spying(model) as seen:
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            prompt_mask=prompt,
            task_ids=torch.tensor([5, 7]),
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            num_beams=beams,
        )
    contexts = [context for name, context in seen if name == "model.layers.0"]
    assert [context.phase for context in contexts] == ["prefill", "decode", "decode"]
    rows = [row for row in (0, 1) for _ in range(beams)]
    first, *rest = contexts
    # Beam search may prefill the two prompts before it expands them.
    expanded = first.batch_size == 2 * beams
    assert torch.equal(first.prompt_masks["decoder"], prompt[rows] if expanded else prompt)
    for context in rest:
        assert context.batch_size == 2 * beams
        assert context.task_ids_B.tolist() == [[5, 7][row] for row in rows]
        assert context.padding_masks["decoder"].shape == (2 * beams, 1), "the mask of the new tokens only"
        assert context.padding_masks["decoder"].all()
        assert context.prompt_masks == {}
        assert context.records == [], "generation records nothing"


def test_encoder_and_decoder_have_their_own_masks() -> None:
    model = mixture_model({**CONFIG, "losses": [{"kind": "load_balance"}]}, "t5").train()
    inputs = batch(family="t5")
    inputs["attention_mask"][1, 3:] = 0
    inputs["labels"][0, 2:] = -100
    with spying(model) as seen:
        model(**inputs)
    context = seen[0][1]
    encoder, decoder = inputs["attention_mask"].bool(), inputs["labels"] != -100
    assert torch.equal(context.padding_masks["encoder"], encoder)
    assert torch.equal(context.padding_masks["decoder"], decoder)
    assert len(context.records) == len(model.injection.routers)
    for record in context.records:
        # Keys and values of cross-attention sit in the decoder but see the encoder's tokens.
        reads_encoder = record.name.startswith("encoder") or record.name.endswith("key_value")
        assert torch.equal(record.mask_T, (encoder if reads_encoder else decoder).reshape(-1)), record.name
        assert record.routing.weights_TN.shape[0] == record.mask_T.shape[0]
    assert any(record.name.endswith("EncDecAttention.key_value") for record in context.records)


def test_decoder_mask_given_by_the_caller_wins() -> None:
    model, inputs = mixture_model(CONFIG, "t5"), batch(family="t5")
    mask = torch.ones_like(inputs["labels"])
    mask[:, -1] = 0
    with spying(model) as seen:
        model(**inputs, decoder_attention_mask=mask)
    assert torch.equal(seen[0][1].padding_masks["decoder"], mask.bool())


def test_encoder_decoder_generation() -> None:
    model, inputs = mixture_model(CONFIG, "t5").eval(), batch(family="t5")
    inputs["attention_mask"][1, 3:] = 0
    with spying(model) as seen:
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            task_ids=torch.tensor([5, 7]),
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
        )
    encoder = [context for name, context in seen if name == "encoder.block.0"]
    decoder = [context for name, context in seen if name == "decoder.block.0"]
    assert len(encoder) == 1, "the encoder runs once"
    assert torch.equal(encoder[0].padding_masks["encoder"], inputs["attention_mask"].bool())
    assert [context.phase for context in decoder] == ["prefill", "decode", "decode"]
    for context in (*encoder, *decoder):
        assert context.batch_size == 2
        assert context.task_ids_B.tolist() == [5, 7]


BY_PROMPT = {**CONFIG, "router": {"kind": "top_k", "scope": "block", "granularity": "prompt"}}


def turns_of(context: RoutingContext, stream: Any, length: int) -> Turns:
    return context.turns(stream, context.batch_size, length, torch.device("cpu"))


@pytest.mark.parametrize("told_by", ["labels", "mask", "nothing"])
def test_what_routers_by_prompt_take_for_the_prompt(told_by: str) -> None:
    """The mask, else the labels of -100, else everything; never padding."""
    model, inputs = mixture_model(BY_PROMPT), batch()
    inputs["attention_mask"][1, :2] = 0
    inputs["labels"][0, :3] = -100
    inputs["labels"][1, :4] = -100
    want = inputs["labels"] == -100
    if told_by == "mask":
        inputs["prompt_mask"] = want.clone()
        inputs["prompt_mask"][0, 2] = want[0, 2] = False
    elif told_by == "nothing":
        inputs.pop("labels")
        want = torch.ones_like(want)
    with spying(model) as seen:
        model(**inputs)
    turns = turns_of(seen[0][1], "decoder", 6)
    assert torch.equal(turns.mask_BJS, (want & inputs["attention_mask"].bool()).unsqueeze(1))
    assert all(context is seen[0][1] for _, context in seen), "found once for all routers"


def test_the_prompt_of_a_decoder_behind_an_encoder_is_its_start_token() -> None:
    model, inputs = mixture_model(BY_PROMPT, "t5"), batch(family="t5")
    inputs["attention_mask"][1, 3:] = 0
    with spying(model) as seen:
        model(**inputs)
    context = seen[0][1]
    first = torch.zeros_like(inputs["labels"]).bool()
    first[:, 0] = True
    assert torch.equal(turns_of(context, "decoder", 4).mask_BJS, first.unsqueeze(1))
    assert torch.equal(turns_of(context, "encoder", 6).mask_BJS, inputs["attention_mask"].bool().unsqueeze(1))
    assert set(context.decided) == set(model.injection.routers)


def test_a_lone_mixture_layer_outside_of_any_pass() -> None:
    model = mixture_model({**CONFIG, "router": {"kind": "top_k"}})
    layer = model.injection.layers["model.layers.0.mlp.up_proj"]
    assert layer(torch.randn(2, 3, 16)).shape == (2, 3, 20)
    assert current_context().records == []


def test_a_shared_router_that_has_not_run_is_explained() -> None:
    model = mixture_model(CONFIG)
    with pytest.raises(RuntimeError, match=r"ruled by the router 'model.layers.0', which has not run.*scope: linear"):
        model.injection.layers["model.layers.0.mlp.up_proj"](torch.randn(2, 3, 16))


def test_a_mask_of_another_size_is_an_error() -> None:
    model = mixture_model({**CONFIG, "losses": [{"kind": "router_z"}]})
    context = RoutingContext(padding_masks={"decoder": torch.ones(2, 3, dtype=torch.bool)}, record=True)
    site = next(iter(model.injection.routers.values()))
    with context.active(), pytest.raises(RuntimeError, match="8 tokens were routed but the padding mask covers 6"):
        site(torch.randn(2, 4, 16))


def test_jitter_leaves_what_other_layers_read_alone() -> None:
    """With jitter in the router, the hidden states that the base layers and experts see are not touched."""
    options: dict[str, Any] = {**CONFIG, "router": {"kind": "top_k", "router_jitter_noise": 0.9, "scope": "block"}}
    model = mixture_model(options).train()
    seen = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append((hidden, hidden.detach().clone()))

    for layer in model.base_model.model.layers:
        layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    model(**batch())
    assert len(seen) == 2
    assert all(torch.equal(hidden, copy) for hidden, copy in seen)


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_the_output_head_reads_contiguous_rows(family: str) -> None:
    """torch would copy a frozen head's weight once for every row of a slice."""
    model, seen = mixture_model(CONFIG, family).eval(), []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    inputs = batch(rows=3, family=family)
    inputs.pop("labels")
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert seen
    assert all(seen)


@pytest.mark.parametrize("width", [5, 9])
def test_a_prompt_mask_of_another_width_is_refused(width: int) -> None:
    """A longer one is not cut."""
    model, inputs = mixture_model({"preset": "milora", "expert": {"r": 2}}), batch()
    with pytest.raises(
        ConfigError, match=rf"prompt_mask: its shape is \(2, {width}\), and that of the inputs \(2, 6\)"
    ):
        model(input_ids=inputs["input_ids"], prompt_mask=torch.ones(2, width, dtype=torch.bool))

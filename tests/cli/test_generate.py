"""`moadapt generate`: streams, beams, tasks, and the decision behind every answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_helpers import invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

from moadapt import MixtureModel, get_mixture_model
from moadapt.cli.generating import AnswerStreamer

PROMPTS = ["w1 w2 w3", "w7", "w4 w4 w9 w11 w2 w0", "w5 w6", "w19 w3 w3"]
MODULES = {
    *[f"self_attn.{name}_proj" for name in "qkvo"],
    *[f"mlp.{name}_proj" for name in ("gate", "up", "down")],
}


def save(base: Path, folder: Path, mixture: dict[str, Any]) -> Path:
    """An adapter with random weights, as `save_pretrained` writes it."""
    model = get_mixture_model(AutoModelForCausalLM.from_pretrained(base), mixture)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def milora(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(project.parent / "base", tmp_path_factory.mktemp("milora"), {"preset": "milora", "expert": {"r": 4}})


@pytest.fixture(scope="module")
def by_task(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mixture = {"preset": "poly", "tasks": ["copy", "next", "other"]}
    return save(project.parent / "base", tmp_path_factory.mktemp("by_task"), mixture)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


def lines(*arguments: object) -> list[dict[str, Any]]:
    result = invoke("generate", *arguments, "--max-new-tokens", 6)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same answers and decisions; weights that differ by a rounding error are the same."""
    for one, other in zip(found, expected, strict=True):
        assert (one["prompt"], one["response"]) == (other["prompt"], other["response"])
        assert set(one["routing"]) == set(other["routing"])
        for router, routing in one["routing"].items():
            assert routing["experts"] == other["routing"][router]["experts"]
            assert routing["weights"] == pytest.approx(other["routing"][router]["weights"], abs=2e-6)


def refusal(*arguments: object, code: int = 2) -> str:
    result = invoke("generate", *arguments)
    assert result.exit_code == code, result.output
    return result.stderr.replace("\n", " ")


# -- streams -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streamers were given to print."""
    seen: list[str] = []
    original = AnswerStreamer.on_finalized_text

    def spy(self: AnswerStreamer, text: str, stream_end: bool = False) -> None:
        seen.append(text)
        original(self, text, stream_end)

    monkeypatch.setattr(AnswerStreamer, "on_finalized_text", spy)
    return seen


def test_a_stream_prints_the_same_text_piece_by_piece(trained: Path, pieces: list[str]) -> None:
    arguments = ["generate", trained, "-p", "w1 w2", "--temperature", 5, "--max-new-tokens", 20]
    whole = invoke(*arguments, "--no-stream")
    assert not pieces
    streamed = invoke(*arguments, "--stream")
    assert streamed.exit_code == 0, streamed.output
    assert streamed.stdout == whole.stdout
    assert len(whole.stdout.split()) > 3
    assert sum(bool(piece.strip()) for piece in pieces) > 3


def test_one_prompt_is_streamed_on_a_terminal_only(
    trained: Path, pieces: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ["generate", trained, "-p", "w1 w2", "--max-new-tokens", 3]
    assert invoke(*arguments).exit_code == 0
    assert not pieces
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    for more in (["-p", "w3"], ["--output", tmp_path / "x.jsonl"], ["--num-beams", 2]):
        assert invoke(*arguments, *more).exit_code == 0
    assert not pieces
    assert invoke(*arguments).exit_code == 0
    assert pieces


@pytest.mark.parametrize(
    "more", [["-p", "w2"], ["--output", "x.jsonl"], ["--num-beams", "2"], ["--routing"]], ids=lambda more: more[0]
)
def test_what_cannot_be_streamed_is_refused(more: list[str], trained: Path, tmp_path: Path) -> None:
    assert "--stream prints one answer" in refusal(trained, "-p", "w1", "--stream", *more)


def test_a_streamer_leaves_out_end_tokens_and_outer_white_space(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Letters:
        def decode(self, tokens: list[int], **kwargs: Any) -> str:
            return "".join(" ab\nZ"[token] for token in tokens)

    streamer = AnswerStreamer(Letters(), [4])
    streamer.put(torch.tensor([[1, 2, 1, 2]]))  # the prompt
    for token in (0, 3, 1, 0, 0, 2, 3, 3, 1, 2, 0, 3, 0, 4, 4):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out == "a  b\n\nab\n"


# -- end tokens, beams -----------------------------------------------------------------------------------------------


def test_the_end_token_of_the_data_ends_an_answer(trained: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trained, adapter, ignore=shutil.ignore_patterns("checkpoint-*", "compare", "logs"))
    arguments = ["-p", "w1 w2", "--temperature", 5, "--max-new-tokens", 20]
    words = invoke("generate", adapter, *arguments).stdout.split()
    end = next(word for word in words[2:] if word not in words[:2])
    config = yaml.safe_load((adapter / "config.yaml").read_text(encoding="utf-8"))
    config["data"]["eos_token"] = end
    (adapter / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    expected = " ".join(words[: words.index(end)])
    assert invoke("generate", adapter, *arguments).stdout.strip() == expected
    assert invoke("generate", adapter, *arguments, "--stream").stdout.strip() == expected


def test_beams_are_those_of_the_model(milora: Path, project: Path, prompts: Path) -> None:
    model = MixtureModel.from_pretrained(None, milora)
    tokenizer = AutoTokenizer.from_pretrained(project.parent / "base")
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([[*tokenizer(prompt).input_ids]])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=3, do_sample=False, max_new_tokens=6
        )
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    beams = lines(milora, "--file", prompts, "--num-beams", 3)
    greedy = lines(milora, "--file", prompts)
    assert [line["response"] for line in beams] == expected
    assert [line["response"] for line in greedy] != expected
    decided = [{**line, "response": answer} for line, answer in zip(greedy, expected, strict=True)]
    assert_same(beams, decided)


# -- decisions -------------------------------------------------------------------------------------------------------


def test_every_answer_comes_with_the_decision_about_its_prompt(milora: Path, project: Path, prompts: Path) -> None:
    """The first block's decision is computed by hand: it reads the embeddings."""
    answers = lines(milora, "--file", prompts, "--batch-size", 3)
    model = MixtureModel.from_pretrained(None, milora)
    tokenizer = AutoTokenizer.from_pretrained(project.parent / "base")
    router = "model.layers.0"
    names = model.expert_names(router)
    assert set(names) == MODULES
    tensors = {
        name.rpartition(".router.")[2] if ".router." in name else name: tensor.double()
        for name, tensor in model.adapter_state_dict().items()
        if name.startswith(router) and model.parameter_role(name) == "router"
    }
    pool_D = next(tensor.flatten() for tensor in tensors.values() if tensor.numel() == 16)
    gate_ND = next(tensor for tensor in tensors.values() if tensor.shape == (7, 16))
    decisions = set()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer["prompt"] == prompt
        assert set(answer["routing"]) == {"model.layers.0", "model.layers.1"}
        ids = torch.tensor(tokenizer(prompt).input_ids)
        hidden_SD = model.get_input_embeddings().weight[ids].detach().double()
        pooled_D = torch.softmax(hidden_SD @ pool_D, dim=0) @ hidden_SD
        probs_N = torch.softmax(torch.nn.functional.gelu(pooled_D) @ gate_ND.T, dim=0)
        top = probs_N.topk(3)
        expected = dict(zip([names[i] for i in top.indices], (top.values / top.values.sum()).tolist(), strict=True))
        found = dict(zip(answer["routing"][router]["experts"], answer["routing"][router]["weights"], strict=True))
        assert found == pytest.approx(expected, abs=2e-6)
        decisions.add(tuple(sorted(found)))
    assert len(decisions) > 1


def test_the_routing_field_can_be_left_out_or_asked_for(milora: Path, prompts: Path, tmp_path: Path) -> None:
    with_field = lines(milora, "--file", prompts)
    without = lines(milora, "--file", prompts, "--no-routing")
    assert [set(line) for line in without] == [{"prompt", "response"}] * len(PROMPTS)
    assert without == [{key: line[key] for key in ("prompt", "response")} for line in with_field]
    assert_same(lines(milora, "-p", PROMPTS[0], "--routing"), with_field[:1])
    output = tmp_path / "answers.jsonl"
    assert lines(milora, "-p", PROMPTS[0], "-o", output) == []
    assert_same([json.loads(line) for line in output.read_text().splitlines()], with_field[:1])
    text = invoke("generate", milora, "-p", PROMPTS[0], "--max-new-tokens", 6).stdout
    assert text.strip() == with_field[0]["response"]


def test_decisions_of_a_base_model_that_uses_no_cache(
    milora: Path, project: Path, prompts: Path, tmp_path: Path
) -> None:
    """They are read from the cache, so there has to be one."""
    base = shutil.copytree(project.parent / "base", tmp_path / "base")
    settings = base / "generation_config.json"
    values = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps({**values, "use_cache": False}))
    assert_same(lines(milora, "--file", prompts, "--base", base), lines(milora, "--file", prompts))


def test_decisions_about_tokens_are_not_written(trained: Path, prompts: Path) -> None:
    assert all(set(line) == {"prompt", "response"} for line in lines(trained, "--file", prompts))
    assert "decides for every token" in refusal(trained, "-p", "w1", "--routing")
    assert "leave merge_after_prefill out" in refusal(trained, "-p", "w1", "--merge-after-prefill")


def test_merging_after_the_prompt_gives_the_same_answers(
    milora: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, bool]] = []
    original = MixtureModel.generate

    def spy(self: MixtureModel, *args: Any, **kwargs: Any) -> Any:
        calls.append((len(kwargs["input_ids"]), kwargs.get("merge_after_prefill", False)))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MixtureModel, "generate", spy)
    plain = lines(milora, "--file", prompts)
    merged = lines(milora, "--file", prompts, "--merge-after-prefill")
    assert_same(merged, plain)
    assert calls == [(len(PROMPTS), False), *[(1, True)] * len(PROMPTS)]


# -- tasks ----------------------------------------------------------------------------------------------------------


def test_the_task_chooses_the_experts(by_task: Path, prompts: Path, tmp_path: Path) -> None:
    copy = lines(by_task, "--file", prompts, "--task", "copy")
    other = lines(by_task, "--file", prompts, "--task", "other")
    assert [line["response"] for line in copy] != [line["response"] for line in other]
    assert copy[0]["routing"] != other[0]["routing"]
    assert all(line["routing"] == copy[0]["routing"] for line in copy)
    assert next(iter(copy[0]["routing"].values()))["experts"] == [0, 1, 2, 3]
    rows = [{"prompt": prompt, "task": "other"} for prompt in PROMPTS[:2]] + [{"prompt": PROMPTS[2]}]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert lines(by_task, "--file", mixed, "--task", "copy") == [*other[:2], copy[2]]


def test_a_task_that_is_unknown_or_missing_or_of_no_use(by_task: Path, trained: Path, tmp_path: Path) -> None:
    message = refusal(by_task, "-p", "w1", "--task", "nxt")
    assert "did you mean 'next'?" in message
    assert "copy, next, other" in message
    assert "name the task with --task" in refusal(by_task, "-p", "w1", code=1)
    assert "does not go by task" in refusal(trained, "-p", "w1", "--task", "copy")
    file = tmp_path / "p.jsonl"
    for row, expected in (
        ({"prompt": "a", "task": "copied"}, "p.jsonl:2: unknown task 'copied'"),
        ({"prompt": "a"}, "p.jsonl:2: this adapter goes by task"),
        ({"prompt": "a", "task": 3}, "p.jsonl:2: `task` must be the name of a task, found int"),
    ):
        file.write_text(json.dumps({"prompt": "a", "task": "copy"}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
        assert expected in refusal(by_task, "--file", file, code=1)


def test_an_adapter_that_takes_unknown_tasks_needs_none(project: Path, prompts: Path, tmp_path: Path) -> None:
    mixture = {"preset": "poly", "tasks": ["copy", "next"], "router": {"unknown_task": "mean"}}
    adapter = save(project.parent / "base", tmp_path / "mean", mixture)
    mean, copy, other = (
        lines(adapter, "--file", prompts, *task) for task in ([], ["--task", "copy"], ["--task", "next"])
    )
    routings = [json.dumps(answers[0]["routing"]) for answers in (mean, copy, other)]
    assert len(set(routings)) == 3
    assert "unknown task" in refusal(adapter, "-p", "w1", "--task", "third")

"""`moadapt inspect`: its numbers against counts of single rows, for every kind of model that has routers."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import WORDS, invoke, run_python
from safetensors.torch import load_file, save_file
from schema_check import mistakes
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

from moadapt import MixtureModel, get_mixture_model
from moadapt.cli import inspect_tables
from moadapt.statistics.document import for_report, routing_schema

IDS = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *WORDS])}


def run(*arguments: object) -> str:
    result = invoke("inspect", *arguments, "--cpu")
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments: object, code: int) -> str:
    result = invoke("inspect", *arguments, "--cpu")
    assert result.exit_code == code, result.output
    return " ".join(result.stderr.split())


def read(folder: Path) -> dict[str, Any]:
    """The document, in the shape of its schema."""
    document: dict[str, Any] = json.loads((folder / "routing.json").read_text(encoding="utf-8"))
    assert mistakes(document, routing_schema()) == []
    return document


def save(base: Path, folder: Path, mixture: dict[str, Any]) -> Path:
    """An adapter with random weights."""
    model = get_mixture_model(AutoModelForCausalLM.from_pretrained(base), mixture)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.save_pretrained(folder)
    return folder


def tokens_of(row: dict[str, str]) -> tuple[list[int], int]:
    """The ids of a row with its end token, and how many are of the prompt."""
    prompt = [IDS[word] for word in row["prompt"].split()]
    return [*prompt, *(IDS[word] for word in row["response"].split()), IDS["</s>"]], len(prompt)


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two tasks and different lengths in one file."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"task": "first", "prompt": "w1 w2 w3", "response": " w4 w5"},
        {"task": "second", "prompt": "w7", "response": " w8 w9 w10 w11"},
        {"task": "first", "prompt": "w1 w2 w3 w12 w13", "response": " w4"},
        {"task": "second", "prompt": "w19 w18 w17", "response": " w16 w15"},
        {"task": "second", "prompt": "w6 w6", "response": " w0"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def inspected(trained: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("inspected")
    text = run(trained, "--data", rows, "--output", output, "--texts", 3)
    (output / "stdout.txt").write_text(text, encoding="utf-8")
    return output


def selections(model: MixtureModel, rows: list[dict[str, str]]) -> list[dict[str, Tensor]]:
    """For each row by itself what every router selects, (T, N), seen by hooks on the routers."""
    found: list[dict[str, Tensor]] = []
    handles = [
        site.router.register_forward_hook(
            lambda _, __, routing, name=name: found[-1].__setitem__(name, routing.selected_TN.clone())
        )
        for name, site in model.injection.routers.items()
    ]
    for row in rows:
        found.append({})
        with torch.no_grad():
            model(torch.tensor([tokens_of(row)[0]]))
    for handle in handles:
        handle.remove()
    return found


# -- the numbers ---------------------------------------------------------------------------------------------------


def test_counts_are_those_of_single_rows(inspected: Path, trained: Path, rows: Path) -> None:
    document, lines = read(inspected), rows_of(rows)
    seen = selections(MixtureModel.from_pretrained(None, trained).eval(), lines)
    assert [router["name"] for router in document["routers"]] == list(seen[0])
    assert document["data"]["tasks"] == [
        {"name": "first", "sequences": 2, "tokens": 6 + 7},
        {"name": "second", "sequences": 3, "tokens": 6 + 6 + 4},
    ]
    for router in document["routers"]:
        expected: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.int64))
        for line, found in zip(lines, seen, strict=True):
            prompt = tokens_of(line)[1]
            expected[line["task"], 0] += found[router["name"]][:prompt].sum(0)
            expected[line["task"], 1] += found[router["name"]][prompt:].sum(0)
        counts = router["counts"]
        assert counts["tasks"] == ["first", "second"]
        for task, name in enumerate(counts["tasks"]):
            for part in (0, 1):
                assert counts["selections"][task][part] == [expected[name, part].tolist(), [0] * 4]
        total = sum(expected.values()).double()
        assert router["rows"] == 29
        assert router["load"]["share"] == pytest.approx((total / total.sum()).tolist())
        assert router["measures"]["max_violation"] == pytest.approx(float(total.max() / total.mean() - 1))
        first = sum(value for (task, _), value in expected.items() if task == "first").double()
        assert router["by_task"]["share"][0] == pytest.approx((first / first.sum()).tolist())
        answer = sum(value for (_, part), value in expected.items() if part == 1).double()
        assert router["by_part"]["answer"] == pytest.approx((answer / answer.sum()).tolist())
        assert router["by_phase"]["decode"] is None


def test_texts_are_rows_with_their_gates(inspected: Path, trained: Path, rows: Path) -> None:
    document, lines = read(inspected), rows_of(rows)
    assert [text["task"] for text in document["text"]] == ["first", "first", "second", "second", "second"]
    by_text = {f"{line['prompt']}{line['response']}": line for line in lines}
    chosen = [by_text["".join(text["tokens"]).removesuffix(" </s>")] for text in document["text"]]
    assert len({line["prompt"] for line in chosen}) == 5
    seen = selections(MixtureModel.from_pretrained(None, trained).eval(), chosen)
    for text, line, found in zip(document["text"], chosen, seen, strict=True):
        ids, prompt = tokens_of(line)
        assert text["part"] == [0] * prompt + [1] * (len(ids) - prompt)
        assert text["total"] == len(ids)
        for name, selected_TN in found.items():
            pairs = text["routers"][name]["all"]
            assert [[expert for expert, _ in gates] for gates in pairs] == [
                row.nonzero().flatten().tolist() for row in selected_TN
            ]
            assert all(0 < weight < 1 for gates in pairs for _, weight in gates)


def test_the_table_of_counts_and_the_page_have_the_same_numbers(inspected: Path) -> None:
    from pyarrow import parquet

    document = read(inspected)
    lines = parquet.read_table(inspected / "routing.parquet").to_pylist()
    assert len(lines) == len(document["routers"]) * 2 * 2 * 2 * 4
    for line in lines:
        router = next(router for router in document["routers"] if router["name"] == line["router"])
        counts = router["counts"]
        place = counts["tasks"].index(line["task"]), ["prompt", "answer"].index(line["part"])
        phase, expert = ["prefill", "decode"].index(line["phase"]), router["experts"].index(line["expert"])
        assert line["selections"] == counts["selections"][place[0]][place[1]][phase][expert]
        assert line["rows"] == counts["rows"][place[0]][place[1]][phase]
        assert line["weight"] == counts["weights"][place[0]][place[1]][phase][expert]
        assert (line["layer"], line["module"]) == (router["layer"], router["module"])
    page = (inspected / "routing.html").read_text(encoding="utf-8")
    shown = json.loads(page.split('id="data">', 1)[1].split("</script>", 1)[0])
    for router, drawn in zip(for_report(document)["routers"], shown["routers"], strict=True):
        assert drawn["load"]["share"] == pytest.approx(router["load"]["share"], rel=1e-4)
        assert drawn["measures"]["entropy_histogram"] == router["measures"]["entropy_histogram"]
    assert "counts" not in shown["routers"][0]


def short(module: str) -> str:
    return module.rpartition(".")[2]


def test_what_is_printed(inspected: Path) -> None:
    document, text = read(inspected), (inspected / "stdout.txt").read_text(encoding="utf-8")
    flat = " ".join(text.split())
    assert "5 sequences, 29 tokens, 2 tasks" in flat
    for router in document["routers"]:
        share, found = router["load"]["share"], router["measures"]
        ends = [f"{end:.1f}" if end < 10 else f"{end:.0f}" for end in (100 * min(share), 100 * max(share))]
        cells = [short(router["module"]), "4", "29", "–".join(ends)]
        cells += [f"{found['max_violation']:.2f}", f"{100 * found['normalised_entropy']:.1f}"]
        line = next(line for line in text.splitlines() if all(cell in line for cell in cells))
        assert f" {router['layer']} " in line
    for verdict in document["verdicts"]:
        assert verdict["text"] in flat


def test_tokens_of_the_vocabulary(trained: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"w1 w{number}", "response": " w2"} for number in range(3, 14)]
    file = tmp_path / "frequent.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run(trained, "--data", file, "--output", tmp_path, "--vocabulary")
    model, document = MixtureModel.from_pretrained(None, trained).eval(), read(tmp_path)
    weights = _weights(model, lines)
    for router in document["routers"]:
        tops: dict[int, list[int]] = defaultdict(list)
        for line, weights_TN in zip(lines, weights[router["name"]], strict=True):
            for token, expert in zip(tokens_of(line)[0], weights_TN.argmax(-1).tolist(), strict=True):
                tops[token].append(expert)
        frequent = {token: experts for token, experts in tops.items() if len(experts) >= 10}
        assert set(frequent) == {IDS["w1"], IDS["w2"], IDS["</s>"]}
        for expert, named in enumerate(router["vocabulary"]["tokens"]):
            shares = {token: experts.count(expert) / len(experts) for token, experts in frequent.items()}
            expected = {token: share for token, share in shares.items() if share > 0}
            assert {item["id"]: item["share"] for item in named} == pytest.approx(expected)
            assert {item["text"] for item in named} <= {"w1", "w2", "</s>"}
            assert all(item["occurrences"] == 11 for item in named)
        most = [max(map(experts.count, set(experts))) / len(experts) for experts in frequent.values()]
        assert router["vocabulary"]["specialisation"] == pytest.approx(sum(most) / len(most))


def _weights(model: MixtureModel, rows: list[dict[str, str]]) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, site in model.injection.routers.items():
        site.router.register_forward_hook(lambda _, __, routing, name=name: found[name].append(routing.weights_TN))
    for row in rows:
        with torch.no_grad():
            model(torch.tensor([tokens_of(row)[0]]))
    return found


def test_batches_and_padding_change_no_count(inspected: Path, trained: Path, rows: Path, tmp_path: Path) -> None:
    run(trained, "--data", rows, "--output", tmp_path, "--batch-size", 1)
    one = read(tmp_path)
    for router, other in zip(read(inspected)["routers"], one["routers"], strict=True):
        for name in ("rows", "selections", "top", "pairs"):
            assert router["counts"][name] == other["counts"][name]


def test_by_default_the_held_out_rows_of_the_run(trained: Path, tmp_path: Path) -> None:
    text = run(trained, "--output", tmp_path, "--max-samples", 3, "--trace", 20)
    document = read(tmp_path)
    assert document["data"]["tasks"] == [
        {"name": name, "sequences": 3, "tokens": 12} for name in ("copy", "next", "after")
    ]
    assert "9 sequences, 36 tokens, 3 tasks" in " ".join(text.split())
    assert (tmp_path / "trace.parquet").is_file()
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [line for line in logged if "routing/layer_1/entropy" in line]
    router = "model.layers.1.mlp.down_proj"
    assert [(row["step"], row[router]["layer_mean_entropy"]) for row in document["training"]] == [
        (line["step"], line["routing/layer_1/entropy"]) for line in expected
    ]
    assert len(expected) == 4


def test_generation_is_recorded_apart(trained: Path, rows: Path, inspected: Path, tmp_path: Path) -> None:
    run(trained, "--data", rows, "--output", tmp_path, "--generate", "--max-new-tokens", 5)
    document = read(tmp_path)
    model = MixtureModel.from_pretrained(None, trained).eval()
    for router, before in zip(document["routers"], read(inspected)["routers"], strict=True):
        assert router["counts"]["selections"] == before["counts"]["selections"]
        expected, decoded = torch.zeros(4), 0
        for line in rows_of(rows):
            ids, prompt = tokens_of(line)
            answer = model.generate(
                torch.tensor([ids[:prompt]]), do_sample=False, max_new_tokens=5, pad_token_id=0, eos_token_id=2
            )[0]
            found = _selected(model, router["name"], answer.tolist())
            # What was generated and read again; end and padding tokens do not count.
            counted = (answer != IDS["</s>"]) & (answer != IDS["<pad>"])
            counted[:prompt], counted[-1] = False, False
            expected += found[counted].sum(0)
            decoded += int(counted.sum())
        assert document["data"]["generated_tokens"] == decoded
        assert router["by_phase"]["decode"] == pytest.approx((expected / expected.sum()).tolist())


def _selected(model: MixtureModel, router: str, ids: list[int]) -> Tensor:
    found: list[Tensor] = []
    site = model.injection.routers[router]
    handle = site.router.register_forward_hook(lambda _, __, routing: found.append(routing.selected_TN.clone()))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return found[0]


# -- other models --------------------------------------------------------------------------------------------------


def test_a_stock_model_has_the_load_of_its_own_router_logits(project: Path, rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixtral"
    shutil.copytree(project.parent / "base", folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=len(IDS), num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes
    )
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(folder)
    text = run(folder, "--data", rows, "--output", tmp_path / "out", "--generate", "--max-new-tokens", 2)
    assert f"{folder}: 5 sequences" in " ".join(text.split())
    document = read(tmp_path / "out")
    assert document["model"]["adapter"] is None
    assert [(router["layer"], router["module"]) for router in document["routers"]] == [(0, "mlp"), (1, "mlp")]
    for layer, router in enumerate(document["routers"]):
        expected = torch.zeros(4)
        for line in rows_of(rows):
            with torch.no_grad():
                output = model(torch.tensor([tokens_of(line)[0]]), output_router_logits=True)
            best = output.router_logits[layer].topk(2).indices
            expected += torch.bincount(best.flatten(), minlength=4)
        assert router["load"]["share"] == pytest.approx((expected / expected.sum()).tolist())
        assert router["by_phase"]["decode"] is not None
        assert set(document["text"][0]["routers"]) == {item["name"] for item in document["routers"]}


def test_routers_that_decide_by_prompt(project: Path, rows: Path, tmp_path: Path) -> None:
    adapter = save(project.parent / "base", tmp_path / "milora", {"preset": "milora", "expert": {"r": 4}})
    run(adapter, "--data", rows, "--output", tmp_path / "out")
    document = read(tmp_path / "out")
    assert {router["granularity"] for router in document["routers"]} == {"prompt"}
    assert {router["rows"] for router in document["routers"]} == {5}
    assert {router["module"] for router in document["routers"]} == {""}
    assert "self_attn.q_proj" in document["routers"][0]["experts"]
    assert document["data"]["tokens"] == 29
    assert document["similarity"] is None
    for text in document["text"]:  # one decision for all tokens
        for gates in text["routers"].values():
            assert gates["all"] == [gates["all"][0]] * text["total"]


def test_routers_that_go_by_task(project: Path, rows: Path, tmp_path: Path) -> None:
    mixture = {"preset": "poly", "tasks": ["other", "second", "first"]}
    adapter = save(project.parent / "base", tmp_path / "poly", mixture)
    run(adapter, "--data", rows, "--output", tmp_path / "out")
    document = read(tmp_path / "out")
    for router in document["routers"]:
        assert router["granularity"] == "task"
        assert router["counts"]["tasks"] == ["other", "second", "first"]
        assert [sum(map(sum, rows)) for rows in router["counts"]["rows"]] == [0, 3, 2]
        assert router["by_task"]["tasks"] == ["second", "first"]
    unnamed = tmp_path / "unnamed.jsonl"
    unnamed.write_text('{"prompt": "w1", "response": " w2"}\n', encoding="utf-8")
    message = refusal(adapter, "--data", unnamed, code=1)
    assert "goes by task, and the file names none; add a column 'task'" in message
    assert "other, second, first" in message
    unnamed.write_text('{"prompt": "w1", "response": " w2", "task": "secnd"}\n', encoding="utf-8")
    assert "has no task 'secnd'; did you mean 'second'?" in refusal(adapter, "--data", unnamed, code=1)


def test_a_converted_model(project: Path, rows: Path, tmp_path: Path) -> None:
    result = invoke("convert", project.parent / "base", "--output", tmp_path / "converted", "--cpu")
    assert result.exit_code == 0, result.output
    run(tmp_path / "converted", "--data", rows, "--output", tmp_path / "out")
    document = read(tmp_path / "out")
    assert [router["module"] for router in document["routers"]] == ["mlp", "mlp"]
    assert {router["rows"] for router in document["routers"]} == {29}
    assert document["routers"][0]["measures"]["experts_per_row"] == pytest.approx(4.0)


def test_an_encoder_decoder_and_rows_without_tasks(project: Path, tmp_path: Path) -> None:
    base = tmp_path / "t5"
    shutil.copytree(project.parent / "base", base, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(IDS), d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(base)
    model = get_mixture_model(
        T5ForConditionalGeneration.from_pretrained(base), {"preset": "molora_topk", "target_modules": ["q", "v"]}
    )
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "rows.csv"
    file.write_text("prompt,response\nw1 w2 w3,w4\nw5,w6 w7\n", encoding="utf-8")
    run(tmp_path / "adapter", "--data", file, "--output", tmp_path / "out", "--generate", "--max-new-tokens", 3)
    document = read(tmp_path / "out")
    assert document["data"]["tasks"] == []
    assert document["data"]["tokens"] == 3 + 2 + 1 + 3  # prompts, and responses with their end tokens
    for router in document["routers"]:
        reads_prompts = router["name"].startswith("encoder") or "EncDecAttention.v" in router["name"]
        assert router["rows"] == (4 if reads_prompts else 5)
    assert all(router["by_task"] is None for router in document["routers"])
    text = document["text"][0]
    encoder = next(gates for name, gates in text["routers"].items() if name.startswith("encoder"))["all"]
    decoder = next(gates for name, gates in text["routers"].items() if name.startswith("decoder"))["all"]
    for place, part in enumerate(text["part"]):
        assert bool(encoder[place]) != bool(decoder[place])
        assert part == 0 or decoder[place]


# -- comparing -----------------------------------------------------------------------------------------------------


def test_two_checkpoints_of_a_run(trained: Path, rows: Path, tmp_path: Path) -> None:
    text = run(trained / "checkpoint-2", "--compare", trained, "--data", rows, "--output", tmp_path)
    document, other = read(tmp_path), read(tmp_path / "other")
    assert document["compare"]["other_summary"] == other["summary"]
    assert "compare" not in other
    lines = rows_of(rows)
    first = selections(MixtureModel.from_pretrained(None, trained / "checkpoint-2").eval(), lines)
    second = selections(MixtureModel.from_pretrained(None, trained).eval(), lines)
    assert [item["name"] for item in document["compare"]["routers"]] == list(first[0])
    for item in document["compare"]["routers"]:
        a = torch.cat([found[item["name"]] for found in first])
        b = torch.cat([found[item["name"]] for found in second])
        assert item["saturation"] == pytest.approx(float((a & b).sum() / b.sum()))
        by_chance = (a.sum(0) * b.sum(0)).sum() / (len(a) * b.sum())
        assert item["chance_saturation"] == pytest.approx(float(by_chance))
        assert item["saturation_rows"] == 29
        cells = [short(item["module"]), f"{item['load_distance']:.2f}", f"{100 * item['saturation']:.1f} ("]
        assert any(all(cell in line for cell in cells) for line in text.splitlines())
    page = (tmp_path / "routing.html").read_text(encoding="utf-8")
    shown_there = json.loads(page.split('id="data">', 1)[1].split("</script>", 1)[0])["compare"]
    assert len(shown_there["routers"]) == len(document["routers"])


def test_a_model_beside_itself_and_one_of_other_routers(
    trained: Path, project: Path, rows: Path, tmp_path: Path
) -> None:
    run(trained, "--compare", trained, "--data", rows, "--output", tmp_path / "same")
    for item in read(tmp_path / "same")["compare"]["routers"]:
        assert (item["load_distance"], item["saturation"]) == (0.0, 1.0)
        assert item["first"] == item["second"]
    target = {"preset": "molora_topk", "num_experts": 3, "target_modules": ["q_proj", "k_proj"]}
    adapter = save(project.parent / "base", tmp_path / "adapter", target)
    text = run(trained, "--compare", adapter, "--data", rows, "--output", tmp_path / "unlike")
    compare = read(tmp_path / "unlike")["compare"]
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert [item["name"] for item in compare["routers"]] == names
    for item in compare["routers"]:  # four experts beside three
        assert item["load_distance"] is None
        assert item["saturation"] is None
    assert compare["only_second"] == [f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 1)]
    assert "only B has 2 routers" in text


def test_many_routers_are_put_together_by_module(trained: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_tables, "MOST_ROUTERS", 3)
    text = " ".join(run(trained, "--compare", trained / "checkpoint-2", "--data", rows).split())
    assert text.count("4 routers are put together by module; none has a warning") == 2
    assert "p ≤ 0.05" in text
    assert len(re.findall(r"\bq_proj 2 ", text)) == 3  # both models, and the comparison


@pytest.mark.slow
def test_two_processes_count_what_one_does(inspected: Path, trained: Path, rows: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "moadapt"]
    arguments = ["inspect", trained, "--compare", trained / "checkpoint-2", "--data", rows, "--output", tmp_path]
    done = run_python(*launcher, *arguments, "--batch-size", 2, "--cpu")
    assert done.returncode == 0, done.stderr
    both = read(tmp_path)
    for router, other in zip(read(inspected)["routers"], both["routers"], strict=True):
        for name in ("rows", "selections", "top", "pairs"):
            assert router["counts"][name] == other["counts"][name]
        assert router["by_task"]["information"] == pytest.approx(other["by_task"]["information"])
    assert {item["saturation_rows"] for item in both["compare"]["routers"]} == {29}


def test_curves_of_a_run_whose_last_line_was_cut_off(trained: Path, rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    whole = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    (folder / "metrics.jsonl").write_text(whole + '{"step": 9, "routing/ent', encoding="utf-8")
    run(folder, "--data", rows, "--output", tmp_path / "out")
    assert read(tmp_path / "out")["training"] is not None


# -- mistakes ------------------------------------------------------------------------------------------------------


def test_the_schema_is_printed(inspected: Path) -> None:
    result = invoke("inspect", "--schema")
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    document = read(inspected)
    assert mistakes(document, schema) == []
    document["routers"][0]["rows"] = 1.5
    del document["summary"]["dead_experts"]
    assert mistakes(document, schema) == [
        "$.summary: dead_experts is missing",
        "$.routers[0].rows: float is no integer",
    ]


def test_what_is_refused(trained: Path, project: Path, rows: Path, tmp_path: Path) -> None:
    base = project.parent / "base"
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("mixture.safetensors", "mixture_config.json"):
        shutil.copy(trained / name, alone / name)
    assert "--data: " in refusal(alone, code=2)
    assert "give rows with --data FILE" in refusal(base, code=2)
    assert "no such file" in refusal(trained, "--data", tmp_path / "missing.jsonl", code=1)
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"question": "w1"}\n', encoding="utf-8")
    assert "no column for the prompt" in refusal(trained, "--data", odd, code=1)
    assert "LlamaForCausalLM has no routers" in refusal(base, "--data", rows, code=2)
    assert "--base: " in refusal(base, "--base", base, "--data", rows, code=2)
    assert "--trace: needs --output" in refusal(trained, "--trace", 5, code=2)
    assert "is a file; name a folder" in refusal(trained, "--output", odd, code=2)
    assert "no such folder" in refusal(tmp_path / "nothing", "--data", rows, code=1)


def test_a_model_that_computes_no_numbers(project: Path, rows: Path, tmp_path: Path) -> None:
    """Its texts cannot be shown; all else can."""
    router = {"kind": "top_k", "num_experts_per_tok": 1, "scope": "block"}
    adapter = save(project.parent / "base", tmp_path / "broken", {"num_experts": 3, "router": router})
    weights = load_file(adapter / "mixture.safetensors")
    save_file(
        {name: torch.full_like(value, torch.nan) for name, value in weights.items()}, adapter / "mixture.safetensors"
    )
    assert "gate weights that are no numbers" in refusal(adapter, "--data", rows, "--output", tmp_path / "a", code=2)
    run(adapter, "--data", rows, "--output", tmp_path / "b", "--texts", 0)
    assert None in read(tmp_path / "b")["routers"][0]["counts"]["weights"][0][0][0]
    assert (tmp_path / "b" / "routing.html").is_file()

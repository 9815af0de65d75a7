"""`train`, and the commands that use what it leaves behind, on a tiny project."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import invoke, run_python
from transformers import AutoModelForCausalLM, AutoTokenizer

from moadapt import MixtureModel
from moadapt.passes import PassRequest, requesting
from moadapt.run_config import load_run_config
from moadapt.train.logging import read_metrics
from moadapt.train.tasks import Task, load_tasks

LORA = "compare={lora: {preset: lora, target_modules: [q_proj, down_proj], expert: {r: 3}}}"


def results(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return loaded


def tasks_of(folder: Path, base: Path) -> list[Task]:
    config = load_run_config(folder / "config.yaml")
    assert config.data is not None
    return load_tasks(config.data, AutoTokenizer.from_pretrained(base))


# -- train --------------------------------------------------------------------------------------------------------


def test_train_leaves_the_files_of_the_design(trained: Path) -> None:
    for folder in (trained, trained / "compare" / "lora"):
        names = {path.name for path in folder.iterdir()}
        files = {"mixture_config.json", "mixture.safetensors", "README.md", "config.yaml", "metrics.jsonl"}
        assert names >= files | {"checkpoint-2", "checkpoint-4"}
    assert not (trained / "compare" / "lora" / "results.json").exists()


def test_saved_config_describes_its_own_run(trained: Path, project: Path) -> None:
    whole = load_run_config(project, [f"training.output_dir={trained}", LORA])
    first, second = whole.runs().values()
    assert load_run_config(trained / "config.yaml") == first
    saved = load_run_config(trained / "compare" / "lora" / "config.yaml")
    assert saved.mixture == second.mixture
    assert saved.training.output_dir == second.training.output_dir


def test_results_hold_what_the_log_and_the_models_say(trained: Path, project: Path) -> None:
    document = results(trained)
    assert [run["name"] for run in document["runs"]] == ["malora", "lora"]
    for run in document["runs"]:
        model = MixtureModel.from_pretrained(None, run["output_dir"], is_trainable=True)
        assert run["trainable_parameters"] == model.get_nb_trainable_parameters()[0]
        assert run["steps"] == 4
        assert run["seconds_per_step"] > 0
        entry = next(entry for entry in read_metrics(run["output_dir"]) if entry["step"] == 4 and "eval/loss" in entry)
        for task in ("copy", "next", "after"):
            assert run["after"][task]["loss"] == entry[f"eval/{task}/loss"]
    first = read_metrics(trained)[0]
    before = document["runs"][0]["before"]
    assert first["step"] == 0
    assert before["next"] == {"loss": first["eval/next/loss"], "exact_match": first["eval/next/exact_match"]}
    assert before["mean"]["loss"] == pytest.approx(sum(before[t]["loss"] for t in ("copy", "next", "after")) / 3)
    assert document["runs"][0]["after"]["mean"]["loss"] < before["mean"]["loss"]


def test_usage_is_a_naive_count_over_real_tokens(trained: Path, project: Path) -> None:
    """One row at a time, so without padding; each token of prompt and answer selects two of four experts."""
    run = results(trained)["runs"][0]
    model = MixtureModel.from_pretrained(None, trained)
    expected: dict[str, dict[str, list[int]]] = {}
    tokens: dict[str, int] = {}
    for task in tasks_of(trained, project.parent / "base"):
        for example in task.eval:
            with torch.no_grad(), requesting(PassRequest(record=True)) as request:
                model.base_model(input_ids=torch.tensor([example.input_ids]))
            assert request.context is not None
            tokens[task.name] = tokens.get(task.name, 0) + len(example.input_ids)
            for record in request.context.records:
                counts = expected.setdefault(record.name, {}).setdefault(task.name, [0] * 4)
                for row in record.routing.selected_TN.tolist():
                    for expert, selected in enumerate(row):
                        counts[expert] += int(selected)
    assert len(expected) == 4  # q_proj and down_proj of two layers
    for name, by_task in expected.items():
        assert run["usage"]["routers"][name]["selections"] == by_task
        assert run["usage"]["routers"][name]["tokens"] == tokens
        assert all(sum(counts) == 2 * tokens[task] for task, counts in by_task.items())
    clearest = expected[run["usage"]["router"]]
    for task, shares in run["usage"]["shares"].items():
        assert shares == pytest.approx([count / sum(clearest[task]) for count in clearest[task]], abs=1e-12)
    assert results(trained)["runs"][1]["usage"] is None  # one expert: nothing to tell


def test_tables_and_model_card_show_the_results(trained: Path) -> None:
    stdout = (trained / "stdout.txt").read_text(encoding="utf-8")
    card = (trained / "README.md").read_text(encoding="utf-8")
    document = results(trained)
    after = document["runs"][0]["after"]
    for text in (stdout, card):
        row = next(line for line in text.splitlines() if re.match(r"[│|] next +[│|] exact_match", line))
        assert f"{after['next']['exact_match']:.3f}" in row
        assert f"{document['runs'][0]['trainable_parameters']:,}" in text
        assert "where each task's tokens went" in text.lower()
    assert "## Results" in card
    assert "## Results" in (trained / "compare" / "lora" / "README.md").read_text(encoding="utf-8")
    assert "tokens went" not in (trained / "compare" / "lora" / "README.md").read_text(encoding="utf-8")


def test_same_command_gives_the_same_run(project: Path, trained: Path, tmp_path: Path) -> None:
    result = invoke("train", project, f"training.output_dir={tmp_path / 'out'}")
    assert result.exit_code == 0
    (again,), first = results(tmp_path / "out")["runs"], results(trained)["runs"][0]
    assert again["after"] == first["after"]
    assert again["usage"] == first["usage"]


def test_second_run_in_the_same_folder_is_refused_and_resume_continues(project: Path, tmp_path: Path) -> None:
    arguments = ["train", project, f"training.output_dir={tmp_path / 'out'}", LORA]
    assert invoke(*arguments, "training.max_steps=2", "training.lr_scheduler_type=constant").exit_code == 0
    config = (tmp_path / "out" / "config.yaml").read_text(encoding="utf-8")
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert "training.output_dir" in refused.stderr
    assert (tmp_path / "out" / "config.yaml").read_text(encoding="utf-8") == config
    arguments += ["training.resume_from_checkpoint=true", "training.lr_scheduler_type=constant"]
    resumed = invoke(*arguments)
    assert resumed.exit_code == 0, resumed.output
    runs = results(tmp_path / "out")["runs"]
    assert [run["steps"] for run in runs] == [4, 4]
    assert runs[0]["before"] is not None  # from the log of the first part
    finished = invoke(*arguments)  # nothing left to do: evaluates and reports
    assert finished.exit_code == 0, finished.output
    assert [run["after"] for run in results(tmp_path / "out")["runs"]] == [run["after"] for run in runs]


def test_run_without_evaluation_rows(project: Path, tmp_path: Path) -> None:
    tasks = "data.tasks=[{name: copy, path: copy.train.jsonl}]"
    training = ["training.eval_strategy=no", "training.eval_steps=null", "training.eval_on_start=false"]
    result = invoke("train", project, tasks, *training, f"training.output_dir={tmp_path}", "training.max_steps=2")
    assert result.exit_code == 0, result.output
    assert "scores" not in result.stdout
    assert "trainable parameters" in result.stdout
    assert results(tmp_path)["runs"][0]["after"] is None


def test_best_checkpoint_is_what_is_reported(project: Path, tmp_path: Path) -> None:
    """With the highest loss as the best, the best evaluation is not the last."""
    changes = ["training.eval_steps=1", "training.save_steps=1", "training.eval_on_start=false"]
    best = ["training.load_best_model_at_end=true", "training.greater_is_better=true"]
    result = invoke("train", project, f"training.output_dir={tmp_path}", *changes, *best)
    assert result.exit_code == 0, result.output
    losses = {entry["step"]: entry["eval/loss"] for entry in read_metrics(tmp_path) if "eval/loss" in entry}
    step = max(losses, key=lambda step: losses[step])
    assert step != 4, "this test needs a run whose last evaluation is not its best"
    assert results(tmp_path)["runs"][0]["after"]["mean"]["loss"] == pytest.approx(losses[step], abs=1e-6)


# -- eval, generate, merge ----------------------------------------------------------------------------------------


def test_eval_gives_the_scores_of_the_training_run(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    result = invoke("eval", trained, "--output", output)
    assert result.exit_code == 0, result.output
    after = results(trained)["runs"][0]["after"]
    scores = json.loads(output.read_text(encoding="utf-8"))
    for task in ("copy", "next", "after"):
        assert scores[task] == pytest.approx(after[task], abs=1e-6)
        assert any(task in line for line in result.stdout.splitlines())
    assert len(scores["predictions"]["copy"]) == 5
    assert scores["base_model"].endswith("base")


def test_eval_of_a_checkpoint_with_overrides_and_another_config(trained: Path, project: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    result = invoke("eval", trained / "checkpoint-4", "data.tasks.0.max_eval_samples=2", "--losses-only", "-o", output)
    assert result.exit_code == 0, result.output
    scores = json.loads(output.read_text(encoding="utf-8"))
    assert scores["copy"]["num_examples"] == 2
    assert "exact_match" not in scores["next"]
    assert scores["next"]["loss"] == pytest.approx(results(trained)["runs"][0]["after"]["next"]["loss"], abs=1e-6)
    result = invoke("eval", trained, project, "data.tasks=[{name: x, path: copy.test.jsonl, eval_fraction: 0.5}]")
    assert result.exit_code == 0, result.output
    assert any("x" in line.split() for line in result.stdout.splitlines())


def test_eval_without_an_adapter_or_a_config(project: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = invoke("eval", tmp_path / "empty", project)
    assert result.exit_code == 1
    assert "mixture_config.json" in result.stderr
    result = invoke("eval", tmp_path / "empty")
    assert result.exit_code == 2
    assert "give a CONFIG" in result.stderr


def test_generate_continues_as_the_evaluation_does(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    assert invoke("eval", trained, "--output", output).exit_code == 0
    expected = json.loads(output.read_text(encoding="utf-8"))["predictions"]["next"]
    config = load_run_config(trained / "config.yaml")
    assert config.data is not None
    assert config.data.tasks is not None
    rows = [json.loads(line) for line in Path(config.data.tasks[1].eval_path or "").read_text().splitlines()]
    longest = 2  # the word and the end token
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows), encoding="utf-8")
    result = invoke("generate", trained, "--file", prompts, "--max-new-tokens", longest, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == [row["prompt"] for row in rows]
    assert [answer["response"] for answer in answers] == expected
    text = tmp_path / "prompts.txt"
    text.write_text("\n\n".join(row["prompt"] for row in rows) + "\n", encoding="utf-8")
    target = tmp_path / "deep" / "answers.jsonl"
    result = invoke("generate", trained, "-f", text, "-o", target, "--max-new-tokens", longest)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert [json.loads(line) for line in target.read_text().splitlines()] == answers
    result = invoke("generate", trained, "-p", rows[0]["prompt"], "-p", rows[1]["prompt"], "--max-new-tokens", longest)
    assert result.stdout.splitlines() == [answers[0]["response"], answers[1]["response"]]


def test_generate_samples_with_a_seed(trained: Path) -> None:
    arguments = ["generate", trained, "-p", "w1 w2", "--temperature", 5, "--max-new-tokens", 20]
    first, again, other = (invoke(*arguments, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}\n', "p.jsonl", "p.jsonl:2"),
        ('{"text": "a"}\n', "p.jsonl", "no column 'prompt'"),
        ("\n\n", "p.txt", "no prompts"),
        ("a\n", "p.csv", "use .txt"),
    ],
)
def test_generate_names_what_is_wrong_with_a_file(
    content: str, name: str, message: str, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    result = invoke("generate", trained, "--file", tmp_path / name)
    assert result.exit_code == 1
    assert message in result.stderr.replace("\n", "")


def test_generate_refuses_options_without_effect(trained: Path) -> None:
    assert invoke("generate", trained, "-p", "w1", "--top-p", 0.5).exit_code == 2
    assert invoke("generate", trained, "-p", "w1", "--file", "x.txt").exit_code == 2
    result = invoke("generate", trained, "-p", "w1", "--dtype", "float31")
    assert result.exit_code == 2
    assert "did you mean 'float32'?" in result.stderr
    result = invoke("generate", trained, "-p", "w1", "--chat")
    assert result.exit_code == 1
    assert "chat template" in result.stderr


def test_merged_model_equals_the_adapter(trained: Path, tmp_path: Path) -> None:
    adapter, output = trained / "compare" / "lora", tmp_path / "merged"
    result = invoke("merge", adapter, "--output", output)
    assert result.exit_code == 0, result.output
    ids = torch.tensor([[1, 4, 5, 9]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(output).eval()(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(trained.parent / "base").eval()(input_ids=ids).logits
        mixture = MixtureModel.from_pretrained(None, adapter)(input_ids=ids).logits
    torch.testing.assert_close(merged, mixture, atol=1e-5, rtol=1e-5)
    assert (merged - base).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(output)("w1 w2").input_ids == [4, 5]
    result = invoke("merge", adapter, "--output", output)
    assert result.exit_code == 2
    assert "--output" in result.stderr


def test_mixture_that_looks_at_its_input_cannot_be_merged(trained: Path, tmp_path: Path) -> None:
    result = invoke("merge", trained, "--output", tmp_path / "merged")
    assert result.exit_code == 1
    assert "routing depends on the input" in result.stderr
    assert not (tmp_path / "merged").exists()


def test_base_option_wins_over_the_adapters_memory(trained: Path, tmp_path: Path) -> None:
    result = invoke("generate", trained, "-p", "w1", "--base", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr


@pytest.mark.slow
def test_quickstart_runs_from_any_folder_and_compares_equal_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
    few = [f"data.tasks.{index}.max_eval_samples=4" for index in range(6)]
    result = invoke("train", config, "training.max_steps=2", "training.eval_steps=2", *few)
    assert result.exit_code == 0, result.output
    mixture, lora = results(tmp_path / "runs" / "quickstart")["runs"]
    assert mixture["trainable_parameters"] == pytest.approx(lora["trainable_parameters"], rel=0.02)
    assert len(mixture["usage"]["shares"]) == 6


# -- several processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_print_once_and_give_the_same_results(project: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "moadapt"]
    options = ["training.per_device_train_batch_size=2", f"training.output_dir={tmp_path / 'out'}"]
    done = run_python(*launcher, "train", project, *options, "deepspeed=zero2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seconds per step") == 1
    assert done.stderr.count("copy: 12 training and 5 evaluation rows") == 1
    options = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]
    assert invoke("train", project, *options, f"training.output_dir={tmp_path / 'single'}").exit_code == 0
    (run,), (single,) = results(tmp_path / "out")["runs"], results(tmp_path / "single")["runs"]
    # Two processes with a micro-batch each, or one with both of them: the same steps.
    for task in ("copy", "next", "after", "mean"):
        assert run["after"][task] == pytest.approx(single["after"][task], abs=1e-5)
    tokens = [router["tokens"] for router in run["usage"]["routers"].values()]
    assert tokens == [router["tokens"] for router in single["usage"]["routers"].values()]
    output = tmp_path / "scores.json"
    done = run_python(*launcher, "eval", tmp_path / "out", "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("examples") == 1
    scores = json.loads(output.read_text(encoding="utf-8"))
    assert scores["next"] == pytest.approx(run["after"]["next"], abs=1e-6)


@pytest.mark.slow
def test_deepspeed_option_under_the_deepspeed_launcher(project: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    arguments = ["--local_rank=0", "train", project, f"training.output_dir={tmp_path}", "deepspeed=zero3"]
    done = run_python("-m", "moadapt", *arguments)  # as that launcher calls it
    assert done.returncode == 0, done.stderr
    (run,) = results(tmp_path)["runs"]
    assert run["steps"] == 4
    assert run["trainable_parameters"] > 0
    assert f"| adapter parameters | {run['trainable_parameters']:,} |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_zero3_takes_the_base_model_apart_while_it_is_loaded(project: Path) -> None:
    pytest.importorskip("deepspeed")
    code = f"""
from moadapt import get_mixture_model
from moadapt.pretrained import load_base
from moadapt.run_config import load_run_config

config = load_run_config({str(project)!r}, ["deepspeed=zero3"])
base = load_base(config, for_training=True)
parts = [hasattr(parameter, "ds_id") for parameter in base.parameters()]
model = get_mixture_model(base, config.mixture)
adapter = [hasattr(parameter, "ds_id") for _, parameter in model.adapter_parameters()]
whole = [hasattr(parameter, "ds_id") for parameter in load_base(config).parameters()]
print(all(parts), any(adapter), any(whole))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == ["True", "False", "False"]

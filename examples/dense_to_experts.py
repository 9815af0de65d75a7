"""From a dense model to routed experts and back out to plain transformers, cell by cell.

    python examples/dense_to_experts.py

Offline, on a CPU, in about a minute. It takes the quickstart's base model (a Llama of half a million parameters) and
notes in the style that this model was pretrained on. Open it in an editor that knows `# %%` cells to run it step by
step. The numbers are those of a tiny model on a tiny language: they show how to look, not what to expect.

An argument names the folder for what it writes; without one it is a temporary folder.
"""

# %% The model and some text
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from moadapt import MixtureModel, MultiTaskTrainer, convert_ffn_to_experts
from moadapt.converted import save_converted
from moadapt.export import export_converted
from moadapt.text_measure import TextResult, measure
from moadapt.train.text import text_batches

torch.set_num_threads(1)
logging.disable_progress_bar()
QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
WORK = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="dense_to_experts_"))
WORK.mkdir(parents=True, exist_ok=True)

spec = importlib.util.spec_from_file_location("quickstart_make", QUICKSTART / "make.py")
assert spec is not None
assert spec.loader is not None
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

for name, rows in {"train": 8000, "test": 1000}.items():
    rng = random.Random(f"notes for {name}")
    lines = [json.dumps({"text": make.note(rng)}) for _ in range(rows)]
    (WORK / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model")
calibration = text_batches(str(WORK / "train.jsonl"), tokenizer, max_length=64, max_tokens=8192, batch_size=64)
held_out = text_batches(str(WORK / "test.jsonl"), tokenizer, max_length=64, batch_size=64)


def dense_model() -> PreTrainedModel:
    """A fresh copy: a conversion changes the model that it is given."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(QUICKSTART / "model", dtype=torch.float32)
    return model.eval()


def show(label: str, result: TextResult) -> None:
    """One line: perplexity on held-out notes, experts at work, and the error of the blocks where it was measured."""
    active = "" if result.mean_active is None else f"   {result.mean_active:.2f} routed experts a token"
    share = "" if result.ffn_share is None else f"   {100 * result.ffn_share:5.1f} % of the FFN"
    error = "" if result.reconstruction is None else f"   error {result.reconstruction:.3f}"
    print(f"{label:<34} perplexity {result.perplexity:7.3f}{active}{share}{error}")


show("dense", measure(dense_model(), held_out))

# %% Without training: how to cut, and how to route
# Eight experts, four of them at work, summed as they are (`combine: unit`). What changes is which neurons sit together.
MEAN_GATE = {"kind": "top_k", "num_experts_per_tok": 4, "combine": "unit", "init": "mean_gate"}
RECIPES = {
    "contiguous, mean gate": {"expert": {"split": {"kind": "contiguous"}}, "router": MEAN_GATE},
    "k-means, mean gate": {"expert": {"split": {"kind": "kmeans"}}, "router": MEAN_GATE},
    "co-activation, mean gate": {"expert": {"split": {"kind": "coactivation"}}, "router": MEAN_GATE},
    "co-activation, norm regression": {
        "expert": {"split": {"kind": "coactivation"}},
        "router": {"kind": "norm_regression", "num_experts_per_tok": 4, "threshold": 0.0},
    },
    "CMoE: 2 shared + 2 of 6": {
        "preset": "cmoe",
        "num_experts": 6,
        "expert": {"num_shared_experts": 2},
        "router": {"num_experts_per_tok": 2},
    },
}
for label, recipe in RECIPES.items():
    model = convert_ffn_to_experts(dense_model(), recipe, calibration)
    show(label, measure(model, held_out, reconstruction=True))

# %% What is exact: the experts without a router are the dense block
model = convert_ffn_to_experts(dense_model(), RECIPES["k-means, mean gate"])
with model.disable_adapter():
    show("k-means, all experts ungated", measure(model, held_out))

# %% DSMoE: a threshold and a straight-through gradient. Before healing it is no model at all
# Its gates are sigmoids below one, times 8 over the number of active experts: nothing like the dense block at step 0.
# `init_std`: scores of about 1 at 96 features, as the default 0.02 makes them at 4096.
torch.manual_seed(0)  # its gates are drawn
dsmoe = convert_ffn_to_experts(
    dense_model(),
    {
        "preset": "dsmoe",
        "router": {"init_std": 0.13},
        "losses": [{"kind": "sparsity", "coef": 1.0}, {"kind": "logits_distillation"}],
    },
)
dsmoe.print_trainable_parameters()
show("DSMoE before healing", measure(dsmoe, held_out, reconstruction=True))

# %% Healing: language-model text is a task like any other
data = {
    "max_length": 64,
    "tasks": [{"name": "notes", "path": str(WORK / "train.jsonl"), "text_column": "text"}],
}
training = {
    "output_dir": str(WORK / "healing"),
    "max_steps": 150,
    "learning_rate": 1e-3,
    "router_learning_rate": 3e-2,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "per_device_train_batch_size": 16,
    "save_strategy": "no",
    "logging_steps": 50,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
trainer = MultiTaskTrainer(dsmoe, tokenizer, data, training)
trainer.train()
trainer.close()
show("DSMoE healed", measure(dsmoe, held_out, reconstruction=True))
print("active share by block:", [f"{block.active_share:.2f}" for block in measure(dsmoe, held_out).blocks])

# %% The threshold can be moved afterwards: quality against work, as DSMoE's table 4
for threshold in (0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7):
    dsmoe.set_router_threshold(threshold)
    show(f"  threshold {threshold}", measure(dsmoe, held_out))
dsmoe.set_router_threshold(0.5)

# %% Save: the dense checkpoint with the routing beside it, and load it again
save_converted(dsmoe, WORK / "converted", tokenizer)
again = MixtureModel.from_pretrained(None, WORK / "converted")
show("saved and loaded", measure(again, held_out))


# %% Export for people without moadapt: a threshold needs code of its own, a fixed k fits a stock architecture
def compared(report: dict[str, Any]) -> str:
    """What the equivalence report, which lies beside the weights, says."""
    numbers = report["comparison"]
    worst, largest = numbers["max_logit_difference"], numbers["max_logit"]
    return f"{report['target']}: logits differ by at most {worst:.1e} (the largest is {largest:.0f})"


print(compared(export_converted(again, "auto_map", WORK / "auto_map", tokenizer, text_batches=held_out)))

# (This one was not healed: what is shown is that the checkpoint computes the same.)
softmax = {"kind": "top_k", "num_experts_per_tok": 4, "combine": "softmax_renorm", "rescale": "n_over_k"}
top_k = convert_ffn_to_experts(dense_model(), {"expert": {"split": {"kind": "kmeans"}}, "router": softmax})
print(compared(export_converted(top_k, "mixtral", WORK / "mixtral", tokenizer, text_batches=held_out)))

# %% Load both in a process that knows transformers only
SCRIPT = """
import sys
sys.modules["moadapt"] = None  # any import of it would fail
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder, own_code in ((sys.argv[1], True), (sys.argv[2], False)):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=own_code)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own_code)
    inputs = tokenizer("The plural of cat, wolf made", return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print(f"{type(model).__name__}: {tokenizer.decode(tokens[0], skip_special_tokens=True)}")
"""
subprocess.run([sys.executable, "-c", SCRIPT, str(WORK / "auto_map"), str(WORK / "mixtral")], check=True)
print(f"everything is in {WORK}")

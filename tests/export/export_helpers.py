"""Converted models to export, and a process without moadapt that loads what was exported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import base_model, batch
from transformers.utils import logging

from moadapt import MixtureModel
from moadapt.convert import convert_ffn_to_experts
from moadapt.export import export_converted

logging.disable_progress_bar()

RANDOM = {"init": "normal", "init_std": 0.5}
ROUTERS: dict[str, dict[str, Any]] = {
    "renorm": {"kind": "top_k", "num_experts_per_tok": 2, "combine": "softmax_renorm", "rescale": "n_over_k", **RANDOM},
    "softmax": {"kind": "top_k", "num_experts_per_tok": 2, "combine": "softmax", "rescale": 3.0, **RANDOM},
    "all": {"kind": "softmax", "init_std": 0.5, "temperature": 0.7},
    "sigmoid": {"kind": "top_k", "num_experts_per_tok": 2, "combine": "sigmoid", "rescale": "n_over_k", **RANDOM},
    "cool": {"kind": "top_k", "num_experts_per_tok": 2, "combine": "softmax_renorm", "temperature": 0.3, **RANDOM},
    "unit": {"kind": "top_k", "num_experts_per_tok": 2, "combine": "unit", "init": "mean_gate"},
    "unit_one": {"kind": "top_k", "num_experts_per_tok": 1, "combine": "unit", "init": "mean_gate"},
    "unit_all": {"kind": "top_k", "num_experts_per_tok": 4, "combine": "unit", "init": "mean_gate"},
    "bias": {"kind": "top_k", "num_experts_per_tok": 2, "combine": "sigmoid", "bias": True, **RANDOM},
    "ste": {"kind": "sigmoid_ste", "init_std": 0.5, "threshold": 0.45},
    "ste_one": {"kind": "sigmoid_ste", "init_std": 0.5, "threshold": 0.9, "min_active": 1, "rescale": "none"},
    "ste_unit": {"kind": "sigmoid_ste", "init_std": 0.5, "combine": "unit", "bias": True},
    "relu": {"kind": "relu", "init_std": 0.5, "rescale": "n_over_active"},
    "representative": {"kind": "representative", "num_experts_per_tok": 2, "learned_scale": True, "absolute": True},
    "signed": {"kind": "representative", "num_experts_per_tok": 2, "unit_norm": True, "rescale": "n_over_k"},
    "norm": {"kind": "norm_regression", "threshold": 0.8, "router_width": 8, "fit": {"steps": 20}},
    "norm_sum": {"kind": "norm_regression", "rule": "cumulative", "num_experts_per_tok": 3, "router_width": 8},
}


@dataclass(frozen=True)
class Case:
    """A converted model and where it goes.

    Attributes:
        name: of the folder, unique.
        to: target.
        router: key of `ROUTERS`, or options.
        family: of the base model.
        shared: shared experts.
        mixture: further options of the mixture.
        expert: further options of the experts.
        base: changes to the base model's config.
        dtype: of the base model.
        export: further arguments of `export_converted`.
    """

    name: str
    to: str
    router: Any
    family: str = "llama"
    shared: Any = 0
    mixture: dict[str, Any] = field(default_factory=dict)
    expert: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    export: dict[str, Any] = field(default_factory=dict)

    def converted(self) -> MixtureModel:
        """The converted model; what starts at zero, or may be trained, is noise."""
        base = base_model(self.family, self.dtype, **self.base)
        router = ROUTERS[self.router] if isinstance(self.router, str) else self.router
        expert = {"num_shared_experts": self.shared, "padding": True, **self.expert}
        config = {"num_experts": 4, "router": router, "expert": expert, **self.mixture}
        model = convert_ffn_to_experts(base, config, [batch(4, 12, seed=9)]).eval()
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.adapter_parameters():
                if not bool(parameter.any()) or model.parameter_role(name) != "router":
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model


def prompts(family: str) -> dict[str, torch.Tensor]:
    """Three rows of twelve tokens, the last with padding on the right."""
    inputs = {name: tensor for name, tensor in batch(3, 12, seed=11).items() if name != "labels"}
    inputs["attention_mask"][2, 9:] = 0
    if family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :7].clone()
    return inputs


@torch.no_grad()
def export_case(case: Case, folder: Path) -> MixtureModel:
    """Export a case, and leave what the converted model computes beside it."""
    model = case.converted()
    export_converted(model, case.to, folder / case.name, **case.export)
    inputs = prompts(case.family)
    logits = model(**inputs).logits
    with model.disable_adapter():
        plain = model(**inputs).logits
    assert (logits - plain).abs().max() > 1e-3 * plain.abs().max() or case.router == "unit_all", "nothing is routed"
    ids = inputs["input_ids"][:2]
    sequences = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, num_beams=2
    )
    kept = {**inputs, "logits": logits, "sequences": sequences}
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, folder / f"{case.name}.safetensors")
    return model


SCRIPT = """
import json, sys
sys.modules["moadapt"] = None  # importing it is an error from here on
import torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoConfig
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
torch.set_num_threads(1)
torch.set_grad_enabled(False)
results = {}
for name, (custom, more) in json.loads(sys.argv[2]).items():
    folder = Path(sys.argv[1]) / name
    kept = load_file(folder.with_suffix(".safetensors"))
    logits, sequences = kept.pop("logits"), kept.pop("sequences")
    options = {"trust_remote_code": True} if custom else {}
    auto = AutoModelForSeq2SeqLM if "decoder_input_ids" in kept else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    result = {"type": model.config.model_type, "class": type(model).__name__}
    result["loading"] = {key: sorted(map(str, value)) for key, value in info.items() if value}
    mask = kept.get("attention_mask") if "decoder_input_ids" not in kept else torch.ones_like(kept["decoder_input_ids"])
    def difference(other):
        return float((other(**kept).logits - logits)[mask.bool()].abs().max())
    result["difference"], result["scale"] = difference(model), float(logits.abs().max())
    ids = kept["input_ids"][:2]
    options_of = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    got = model.generate(input_ids=ids, **options_of)
    result["generated"] = got.shape == sequences.shape and bool((got == sequences).all())
    if more:
        again = folder / "again"
        model.save_pretrained(again)
        result["again"] = difference(auto.from_pretrained(again, dtype=torch.float32, **options))
        headless = AutoModel.from_pretrained(folder, dtype=torch.float32, **options)
        result["headless"] = type(headless).__name__
        half = auto.from_pretrained(folder, dtype=torch.bfloat16, **options)
        result["router"] = sorted({str(p.dtype) for n, p in half.named_parameters() if ".router." in n})
        result["half"] = bool(half(**kept).logits.isfinite().all())
        fresh = auto.from_config(AutoConfig.from_pretrained(folder, **options), **options)
        result["fresh"] = bool(fresh(**kept).logits.isfinite().all())
    results[name] = result
loaded = [name for name, module in sys.modules.items() if name.split(".")[0] == "moadapt" and module is not None]
assert not loaded, loaded
print(json.dumps(results))
"""


def load_elsewhere(cases: Iterable[Case], folder: Path, more: Collection[str] = ()) -> dict[str, Any]:
    """Load exports in a process that cannot import moadapt, and compare there with what was kept.

    Args:
        cases: what to load.
        folder: where it lies.
        more: names of cases with their own code that are saved again, and loaded in other ways too.
    """
    names = {case.name: (case.to == "auto_map", case.name in more) for case in cases}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(names)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=folder,
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result

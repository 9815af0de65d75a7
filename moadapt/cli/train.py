"""`moadapt train`."""

from __future__ import annotations

from moadapt.cli.arguments import ConfigPath, Overrides
from moadapt.cli.console import guarded, is_main_process, quiet_libraries


@guarded
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a mixture on the tasks of a config, evaluate it, and save it.

    Writes to training.output_dir: checkpoints, the final adapter (mixture_config.json, mixture.safetensors,
    README.md), the resolved config.yaml, metrics.jsonl, results.json, and the files of the trackers in report_to.
    Mixtures under [bold]compare[/bold] are trained next, on the same data with the same training options, into
    output_dir/compare/NAME. At the end: scores before and after, and which experts each task's tokens went to.

    [bold]Examples[/bold]

      moadapt train CONFIG.yaml
      moadapt train CONFIG.yaml training.max_steps=100 mixture.expert.r=4
      moadapt train CONFIG.yaml training.resume_from_checkpoint=true
      torchrun --nproc_per_node 8 -m moadapt train CONFIG.yaml deepspeed=zero2
      deepspeed --num_gpus 8 --module moadapt train CONFIG.yaml deepspeed=zero3
      accelerate launch -m moadapt train CONFIG.yaml deepspeed=zero1
    """
    from moadapt.cli.report import print_reports
    from moadapt.cli.running import train_all
    from moadapt.run_config import load_run_config
    from moadapt.train.start import leave_processes

    quiet_libraries()
    run = load_run_config(config, overrides or (), needs=("model_name_or_path", "mixture", "data"))
    reports = train_all(run)
    if is_main_process():
        print_reports(reports)
    leave_processes()

"""Training: data, sampling, engines, checkpoints, evaluation and the multi-task trainer.

Import what you need from its modules, as `from moadapt.train.tasks import load_tasks`; this file loads nothing.
"""

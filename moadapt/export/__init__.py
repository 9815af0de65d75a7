"""Converted models as checkpoints that transformers loads, with or without code of their own."""

from moadapt.export.export import REPORT_FILE, export_converted, refusals
from moadapt.export.targets import AUTO_MAP, STOCK, TARGETS

__all__ = ["AUTO_MAP", "REPORT_FILE", "STOCK", "TARGETS", "export_converted", "refusals"]

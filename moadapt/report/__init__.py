"""One HTML file that shows what routers did: opens offline, needs nothing but a browser."""

from moadapt.report.render import render_report

__all__ = ["render_report"]

"""The command line. `main` is the entry point; the commands import what they need when they run."""

from __future__ import annotations


def main() -> None:
    """Run the command that the process's arguments name."""
    from moadapt.cli.app import app
    from moadapt.cli.console import prepare_terminal

    prepare_terminal()
    app(prog_name="moadapt")

"""``bayesdiff-sweep`` and ``sweep.py``: every combination of the given values."""

from omegaconf import DictConfig

from bayesdiff.cli import one_line_errors
from bayesdiff.commands.start import start


def main() -> None:
    """Read the command line and run every cell."""
    with one_line_errors():
        try:
            start(one_cell, "sweep")
        except Exception as error:
            from bayesdiff.sweeps.sweep import lost_worker

            if (lost := lost_worker(error)) is not None:
                raise lost from error
            raise


def one_cell(cfg: DictConfig) -> float | None:
    """Run one cell of the sweep."""
    from bayesdiff.sweeps import sweep

    with one_line_errors():
        return sweep.run_cell(cfg)

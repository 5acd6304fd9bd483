"""``bayesdiff-train`` and ``train.py``: one run."""

from omegaconf import DictConfig

from bayesdiff.cli import one_line_errors
from bayesdiff.commands.start import start


def main() -> None:
    """Read the command line and run."""
    with one_line_errors():
        start(one_run, "train")


def one_run(cfg: DictConfig) -> None:
    """Run every stage whose artefact is missing."""
    with one_line_errors():
        if cfg.dry_run:
            from bayesdiff.sweeps.plan import dry_run

            return dry_run.one(cfg)
        from bayesdiff import pipeline

        pipeline.show(pipeline.run(cfg))

"""Train, fit the posterior, sample with uncertainty, score and report: see README.md."""

import hydra
from omegaconf import DictConfig

from bayesdiff.cli import one_line_errors


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Run every stage whose artefact is missing."""
    with one_line_errors():
        if cfg.dry_run:
            from bayesdiff.sweeps.plan import dry_run

            return dry_run.one(cfg)
        from bayesdiff import pipeline

        pipeline.show(pipeline.run(cfg))


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Run every combination of the given values: see README.md.

python sweep.py -m laplace.prior_precision=1,10,100
python sweep.py -m hydra/launcher=joblib hydra.launcher.n_jobs=2 seed=0,1,2,3
"""

import hydra
from omegaconf import DictConfig

from bayesdiff.cli import one_line_errors


@hydra.main(version_base="1.3", config_path="configs", config_name="sweep")
def main(cfg: DictConfig) -> float | None:
    """Run one cell of the sweep."""
    from bayesdiff.sweeps import sweep

    with one_line_errors():
        return sweep.run_cell(cfg)


if __name__ == "__main__":
    with one_line_errors():
        try:
            main()
        except Exception as error:
            from bayesdiff.sweeps.sweep import lost_worker

            if (lost := lost_worker(error)) is not None:
                raise lost from error
            raise

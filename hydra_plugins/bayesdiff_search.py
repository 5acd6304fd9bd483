"""Hydra takes sweepers from this package only; this one is in bayesdiff.sweeps.search."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSearch(Sweeper):
    """Cells that Optuna proposes, see ``configs/hydra/sweeper/optuna.yaml``."""

    def __init__(self, params: Any = None, **settings: Any) -> None:
        self.params, self.settings = dict(params or {}), settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the launcher ready."""
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the study to its end."""
        from bayesdiff.sweeps.search import Search

        words = [f"{key}={value}" for key, value in self.params.items()]
        search = Search.of([*words, *arguments], self.config, **self.settings)
        search.run(self._launch)

    def _launch(self, cells: list[list[str]], first: int) -> list[float | None]:
        self.validate_batch_is_legal(cells)
        return [job.return_value for job in self.launcher.launch(cells, initial_job_idx=first)]

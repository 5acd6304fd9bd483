"""``dry_run=true``: cells of a sweep leave what they are, the plan is made of all at once."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bayesdiff.checks import UserError
from bayesdiff.storage.artefacts import read_json, write_json, write_text

# Named in configs/hydra too: Hydra's own files of a sweep go there.
FOLDER = "BAYESDIFF_SWEEPS"


def one(cfg: DictConfig) -> None:
    """Print the plan of a single run, or refuse it with its one line."""
    from bayesdiff.sweeps.plan import planner

    refused = planner.show([((), cfg)])
    if refused:
        sys.exit(f"error: {refused[0].removeprefix('cell 0: ')}")


def begin(config: DictConfig) -> None:
    """Make a place for the cells' configurations, outside output_dir.

    Raises:
        UserError: if an optimiser is to choose the cells.
    """
    if "optuna" in str(config.hydra.sweeper.get("_target_", "")).lower():
        raise UserError(
            "dry_run=true cannot know what an optimiser will choose; give the values themselves, "
            "as in python sweep.py -m KEY=1,2 dry_run=true"
        )
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="bayesdiff-plan-")


def note(cfg: DictConfig) -> None:
    """Leave the configuration of one cell."""
    number, folder = HydraConfig.get().job.num, Path(os.environ[FOLDER])
    overrides = list(HydraConfig.get().overrides.task)
    write_text(folder / f"{number}.yaml", OmegaConf.to_yaml(cfg))
    write_json(folder / f"{number}.json", {"overrides": overrides})


def end(config: DictConfig) -> None:
    """Print the plan of all cells; exit with 1 if some are refused."""
    from bayesdiff.sweeps.plan import planner

    folder = Path(os.environ.pop(FOLDER))
    hydra = HydraConfig.instance()
    try:
        given = [
            ((read_json(path) or {})["overrides"], _configuration(path.with_suffix(".yaml")))
            for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
        ]
        hydra.set_config(config)  # some things work in a single run alone
        refused = planner.show(given)
    finally:
        hydra.cfg = None
        shutil.rmtree(folder, ignore_errors=True)
    if refused:
        cells: dict[str, list[str]] = {}
        for line in refused:
            place, _, reason = line.removeprefix("cell ").partition(": ")
            cells.setdefault(reason, []).append(place)
        reasons = "; ".join(f"cell {', '.join(places)}: {why}" for why, places in cells.items())
        sys.exit(f"error: {len(refused)} of {len(given)} cells would be refused: {reasons}")


def _configuration(path: Path) -> DictConfig:
    found = OmegaConf.load(path)
    assert isinstance(found, DictConfig)
    return found

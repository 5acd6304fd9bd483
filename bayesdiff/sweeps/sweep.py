"""A sweep: one cell per combination, each addressed by content, put together at the end."""

import importlib.util
import logging
import os
import shlex
import shutil
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from bayesdiff.checks import UserError
from bayesdiff.options.local_paths import settle
from bayesdiff.runs import run_log
from bayesdiff.storage.artefacts import key_of, read_json, write_json
from bayesdiff.storage.atomic import check_writable
from bayesdiff.sweeps.objective import DEFAULT, value_of
from bayesdiff.sweeps.plan import dry_run
from bayesdiff.sweeps.slots import SLOTS, device_slot

log = logging.getLogger(__name__)

_FOLDER = "BAYESDIFF_SWEEP"


def run_cell(cfg: DictConfig) -> float | None:
    """Run one cell and leave its row for the table; a failure is a row too.

    Returns:
        The objective, for sweepers that look for something; None without it or after a failure.
    """
    from bayesdiff.cli import explain, mendable

    if cfg.dry_run:
        dry_run.note(cfg)
        return None
    overrides = list(HydraConfig.get().overrides.task)
    started = time.perf_counter()
    number = HydraConfig.get().job.num
    row: dict[str, Any] = {"number": number, "overrides": overrides, "status": "failed"}
    metrics: dict[str, float] = {}
    folder = os.environ.get(_FOLDER)
    try:
        with run_log.recording(*overrides), slot_of(cfg, folder):
            from bayesdiff import pipeline

            result = pipeline.run(cfg)
        metrics = result.metrics
        row |= {"status": "done", "folder": str(result.folder), "samples": str(result.samples)}
        row |= {"settings": result.settings, "metrics": metrics}
        row |= {"headlines": list(result.headlines)}
    except Exception as error:  # One bad cell must not take the others with it.
        row["error"] = explain(error)
        trace = mendable(error) is None
        log.error("cell %d failed: %s", number, row["error"], exc_info=trace)
    row["seconds"] = round(time.perf_counter() - started, 1)
    if folder:
        write_json(Path(folder) / "cells" / f"{key_of(sorted(overrides))}.json", row)
    elif row["status"] == "failed":
        sys.exit(f"error: {row['error']}")
    return value_of(cfg.get("objective", DEFAULT), metrics)


class SweepReport(Callback):
    """Hydra callback: names the sweep's folder before the cells, writes its table after them.

    Example:
        >>> words = [expanded(word) for word in ("seed=0,1", "model=flow,diffusion")]
        >>> key_of(sorted(words))[:8]  # the folder in outputs/sweeps: same command, same folder
        '8e769634'
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Same command, same folder: a sweep started again continues its own table.

        Rows stay: every cell writes its own anew, and another process may be at the same sweep.
        """
        from bayesdiff.cli import explain

        try:
            settle(config)
            overrides = [expanded(str(o)) for o in config.hydra.overrides.task]
            check_engines(config)
            if config.dry_run:
                return dry_run.begin(config)
            check_writable(Path(config.output_dir))
        except Exception as error:  # Hydra would warn of it, and run the cells without a table
            sys.exit(f"error: {explain(error)}")
        overrides += [f"{k}={v}" for k, v in (config.hydra.sweeper.get("params") or {}).items()]
        folder = Path(config.output_dir) / "sweeps" / key_of(sorted(overrides))[:8]
        os.environ[_FOLDER] = str(folder)  # workers have it from here
        os.environ[dry_run.FOLDER] = str(folder.parent)  # Hydra's own, which expands no path
        tune(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the table and the report; exit with 1 if a cell failed."""
        if config.dry_run:
            return dry_run.end(config)
        from bayesdiff.storage.locks import alone
        from bayesdiff.sweeps import report

        folder = Path(os.environ.pop(_FOLDER))
        os.environ.pop(dry_run.FOLDER, None)
        given = config.hydra.overrides
        pdf = bool(OmegaConf.select(config, "report.pdf", default=True))
        with alone(folder / "report.html"):  # another process may end the same sweep
            there = (folder / "cells").glob("[!.]*.json")
            rows = [row for path in there if (row := read_json(path))]
            rows.sort(key=lambda row: row["number"])
            if rows:
                command = report.command_of(given.task, given.hydra)
                report.write(folder, rows, command, pdf=pdf)
        failed = [row for row in rows if row["status"] != "done"]
        if failed:
            lines = "; ".join(f"cell {row['number']}: {row['error']}" for row in failed)
            sys.exit(
                f"error: {len(failed)} of {len(rows)} cells failed, the rest is kept: {lines}"
            )


def expanded(word: str) -> str:
    """An override with what its glob matches now: with another choice it is another sweep.

    Raises:
        UserError: if that is nothing.
    """
    here = GlobalHydra.instance()
    loader = here.config_loader() if here.is_initialized() else None
    (override,) = OverridesParser.create(config_loader=loader).parse_overrides([word])
    if loader is None or not isinstance(override.value(), Glob):
        return word
    matches = list(override.sweep_string_iterator())
    if not matches:
        raise UserError(f"{word} matches nothing; --help lists what each group has")
    return f"{override.get_key_element()}={','.join(matches)}"


def slot_of(cfg: DictConfig, folder: str | None) -> AbstractContextManager[None]:
    """The device for a cell; none to wait for outside of a sweep."""
    if folder is None:
        return nullcontext()
    chosen = str(cfg.trainer.devices) not in ("1", "auto")  # by the user
    return device_slot(Path(folder), "cpu" if chosen else str(cfg.trainer.accelerator))


def tune(config: DictConfig) -> None:
    """Tell cells how many run at once; give those that wait for a device the time to.

    This is the one place that knows about launchers.
    """
    launcher = config.hydra.launcher
    if launcher.get("n_jobs", -1) > 0:
        os.environ.setdefault(SLOTS, str(launcher.n_jobs))
    if launcher._target_.endswith("SlurmLauncher"):
        os.environ.setdefault(SLOTS, "0")
    given = any("launcher.timeout_min" in str(word) for word in config.hydra.overrides.hydra)
    if launcher._target_.endswith("LocalLauncher") and not given:
        # All cells start at once and wait for each other; submitit would kill them in an hour.
        launcher.timeout_min = 7 * 24 * 60


def check_engines(config: DictConfig) -> None:
    """Refuse, before the first cell, a sweep that its launcher or sweeper cannot run.

    Raises:
        UserError: if a plugin or SLURM is missing, or a cell takes several devices.
    """
    launcher, sweeper = (str(config.hydra[name]._target_) for name in ("launcher", "sweeper"))
    for target, module in {
        launcher: ".".join(launcher.split(".")[:2]),
        sweeper: "optuna" if sweeper.endswith("OptunaSearch") else "hydra",
    }.items():
        if not _is_there(module):
            package = module.rpartition(".")[2].replace("_", "-")
            raise UserError(f"{target} needs {package}; pip install '.[sweep]' has it")
    if launcher.endswith("SlurmLauncher") and shutil.which("srun") is None:
        raise UserError(
            "hydra/launcher=submitit_slurm needs SLURM and there is no srun here; start it on the "
            "cluster, or use hydra/launcher=submitit_local or joblib"
        )
    if config.hydra.launcher.get("n_jobs") == 0:
        raise UserError("hydra.launcher.n_jobs=0 starts no worker; give 1 or more, or -1 for all")
    devices = config.trainer.devices
    count = (
        devices if isinstance(devices, int) else len(devices) if OmegaConf.is_list(devices) else 1
    )
    if count > 1:
        raise UserError(_one_device(config, devices))


def lost_worker(error: BaseException) -> UserError | None:
    """What to say where a launcher's process ended without handing back its cell, else None."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if not names & {"BrokenProcessPool", "UncompletedJobError", "FailedJobError", "TimeoutError"}:
        return None
    line = " ".join(str(error).split())[:200]
    return UserError(
        f"a worker of the sweep was killed or took too long ({line}); finished cells are kept and "
        "the same command goes on, with fewer at once if memory was short"
    )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _one_device(config: DictConfig, devices: Any) -> str:
    """The refusal of several devices per cell, with the two commands that do it."""
    words = [expanded(str(o)) for o in config.hydra.overrides.task]
    given = OverridesParser.create().parse_overrides(words)
    first = [
        f"{o.get_key_element()}={next(iter(o.sweep_string_iterator()))}"
        if o.is_discrete_sweep()
        else o.input_line or ""
        for o in given
    ]
    many = ("trainer=", "trainer.devices=", "trainer.strategy=", "+trainer.strategy=")
    rest = [word for word in words if not word.startswith(many)]
    return (
        f"a sweep's cells take one device each, trainer.devices={devices} takes more; train with "
        f"all of them first: python train.py {shlex.join(first)} (once per model), then sweep "
        f"over what is trained: python sweep.py -m {shlex.join(rest)}"
    )

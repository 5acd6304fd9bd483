"""A sweep: one cell per combination, each addressed by content, put together at the end."""

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from bayesdiff.artefacts import key_of, read_json, write_json
from bayesdiff.checks import UserError

log = logging.getLogger(__name__)

_FOLDER = "BAYESDIFF_SWEEP"


def run_cell(cfg: DictConfig) -> float | None:
    """Run one cell and leave its row for the table; a failure is a row too.

    Returns:
        The FID, for sweepers that minimise something; None without scores or after a failure.
    """
    from bayesdiff import pipeline
    from bayesdiff.cli import explain

    overrides = list(HydraConfig.get().overrides.task)
    started = time.perf_counter()
    number = HydraConfig.get().job.num
    row: dict[str, Any] = {"number": number, "overrides": overrides, "status": "failed"}
    metrics: dict[str, float] = {}
    try:
        result = pipeline.run(cfg)
        metrics = result.metrics
        row |= {"status": "done", "folder": str(result.folder)}
        row |= {"settings": result.settings, "metrics": metrics}
    except Exception as error:  # One bad cell must not take the others with it.
        row["error"] = explain(error)
        # A mistake in a value needs its line only; anything else needs the place it came from.
        known = row["error"] != str(error) or isinstance(error, UserError)
        log.error("cell %d failed: %s", number, row["error"], exc_info=not known)
    row["seconds"] = round(time.perf_counter() - started, 1)
    folder = os.environ.get(_FOLDER)
    if folder:
        write_json(Path(folder) / "cells" / f"{key_of(overrides)}.json", row)
    elif row["status"] == "failed":
        sys.exit(f"error: {row['error']}")
    return next((v for name, v in metrics.items() if name.startswith("fid@")), None)


class SweepReport(Callback):
    """Hydra callback: names the sweep's folder before the cells, writes its table after them."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Same command, same folder: a sweep started again continues its own table."""
        overrides = [str(o) for o in config.hydra.overrides.task]
        folder = Path(config.output_dir) / "sweeps" / key_of(sorted(overrides))[:8]
        for stale in (folder / "cells").glob("*.json"):
            stale.unlink()
        os.environ[_FOLDER] = str(folder)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write ``sweep.csv``, and the figure; exit with 1 if a cell failed."""
        folder = Path(os.environ.pop(_FOLDER))
        rows = [row for path in (folder / "cells").glob("*.json") if (row := read_json(path))]
        rows.sort(key=lambda row: row["number"])
        if rows:
            report(folder, rows)
        failed = [row for row in rows if row["status"] != "done"]
        if failed:
            lines = "; ".join(f"cell {row['number']}: {row['error']}" for row in failed)
            sys.exit(
                f"error: {len(failed)} of {len(rows)} cells failed, the rest is kept: {lines}"
            )


def report(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Table on the screen and as ``sweep.csv``, one figure; cells wrote their own HPARAMS rows."""
    from bayesdiff.report import figures, table

    keys = swept_keys(rows)
    flat = [flatten(row, keys) for row in rows]
    table.write_csv(folder / "sweep.csv", flat)
    done = [row for row in flat if row["status"] == "done"]
    metrics = [name for name in shown_metrics(rows) if any(name in row for row in done)]
    table.show(f"sweep: {folder / 'sweep.csv'}", flat, [*keys, *metrics, "status"])
    if done and keys and metrics:
        figures.save(figures.sweep_figure(done, keys, metrics), folder / "sweep.png")


def swept_keys(rows: list[dict[str, Any]]) -> list[str]:
    """Override keys with more than one value over the cells, in the order they were given."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for override in row["overrides"]:
            key, _, value = override.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, seen in values.items() if len(seen) > 1] or list(values)


def flatten(row: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """One table row: the swept values first, then status, metrics and folder."""
    given = dict(override.partition("=")[::2] for override in row["overrides"])
    flat: dict[str, Any] = {key: _number(given.get(key, "")) for key in keys}
    flat |= {"status": row["status"], **row.get("metrics", {}), "seconds": row["seconds"]}
    return flat | {"folder": row.get("folder", ""), "error": row.get("error", "")}


def shown_metrics(rows: list[dict[str, Any]]) -> list[str]:
    """The few metrics that fit on a screen; the CSV has all of them."""
    names = [name for row in rows for name in row.get("metrics", {})]
    wanted = (
        "fid@", "is@", "nfe", "summed_variance/mean", "laplace/effective_parameters",
        "validation/image_rank", "validation/pixel_rank", "validation/log_ratio",
    )  # fmt: skip
    return list(
        dict.fromkeys(
            n for w in wanted for n in names if n == w or w[-1] == "@" and n.startswith(w)
        )
    )


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text

"""A cell's pictures, its place in TensorBoard and other loggers, and metrics.json, made once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from bayesdiff.laplace.evidence_grid import EvidenceCurve
from bayesdiff.machine.costs import making
from bayesdiff.metrics.validation import Validation
from bayesdiff.report.loggers import Loggers
from bayesdiff.report.options import options_of
from bayesdiff.runs.address import Address
from bayesdiff.runs.build import Run, plain
from bayesdiff.storage.artefacts import (
    Artefact,
    read_json,
    weights_key,
    write_json,
    write_text,
)
from bayesdiff.storage.atomic import named_disk
from bayesdiff.uncertainty import Samples

# In the place of a report's options while it is made.
_UNFINISHED = "unfinished"


def loggers_of(run: Run, folder: Path, record: Mapping[str, Any]) -> Loggers:
    """The run's loggers for a cell; ``record`` says which of them have its report."""
    had = frozenset(record.get("loggers", ()))
    return Loggers(run.cfg.get("logger"), folder, run.folder.name, "cell", had)


def record_of(run: Run, folder: Path, key: str) -> dict[str, Any]:
    """What metrics.json says, where the report beside it shows what is asked for; else nothing.

    Args:
        run: with its options.
        folder: of the cell.
        key: of its numbers.
    """
    there = read_json(folder / "metrics.json") or {}
    same = (there.get("key"), there.get("report")) == (key, plain(run.cfg.get("report")))
    return there if same else {}


def is_made(run: Run, folder: Path, key: str) -> bool:
    """Whether a cell's report is there, and every logger has it."""
    record = record_of(run, folder, key)
    return bool(record) and not loggers_of(run, folder, record).new


def measured(at: Address, samples: Samples) -> Mapping[str, Tensor]:
    """What the figures of the run's space measure beside the samples; every process calls it."""
    from bayesdiff.report.pictures import figures_of

    setup = at.setup
    figures = figures_of(setup.run.data.space)
    if not figures.measures:
        return {}
    file = plane_at(at)
    made_by = setup.starts, setup.estimator.for_run(setup.run), setup.posterior
    return file.arrays(lambda: figures.measure(*made_by, samples, setup.run.folder))


def plane_at(at: Address) -> Artefact:
    """What the figures of the run's space measure beside the samples."""
    path = at.setup.run.folder / f"plane-{at.maps.key[:8]}.npz"
    return Artefact(path, at.maps.key, "plane")


def report(
    at: Address,
    metrics: Mapping[str, float],
    samples: Samples,
    scores: Mapping[str, Tensor],
    validation: Validation | None,
    evidence: EvidenceCurve | None,
    beside: Mapping[str, Tensor],
) -> Loggers:
    """Pictures, TensorBoard, metrics.json last: its presence says that all else is there.

    Args:
        at: where the cell is, with what it works with.
        metrics: all numbers.
        samples: images with their maps.
        scores: by which the report chooses and sorts them.
        validation: of the maps, where it was asked for.
        evidence: over prior_precision, where it is known.
        beside: what ``measured`` gave.

    Returns:
        The loggers, which know who has the report.
    """
    from bayesdiff.report import board, pictures

    run, settings = at.setup.run, at.setup.settings
    path = at.folder / "metrics.json"
    record = record_of(run, at.folder, at.cell)
    loggers = loggers_of(run, at.folder, record)
    if record and not loggers.new:
        return loggers
    if earlier := read_json(path):  # its pictures are about to go
        write_json(path, earlier | {"report": _UNFINISHED})
    with named_disk(at.folder), making("report"):
        board.write(
            at.folder / "tensorboard",
            *(samples, metrics, settings, run.classes),
            scores=scores,
            options=options_of(run.cfg),
            validation=validation,
            evidence=evidence,
            loggers=loggers,
            drawn_by=pictures.figures_of(run.data.space),
            measured=beside,
        )
    write_text(at.folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(run.cfg, resolve=True))
    record = {
        "key": at.cell,
        "metrics": metrics,
        "settings": settings,
        "samples": at.maps.path.name,
        "estimator": samples.estimator,
        "weights": weights_key(run.model),
        "report": plain(run.cfg.get("report")),
        "loggers": sorted(loggers.had | loggers.served),
    }
    (at.folder / "image-scores.json").unlink(missing_ok=True)  # of an older version
    write_json(path, record)
    return loggers

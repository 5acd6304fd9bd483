"""A report in TensorBoard and in all other loggers: numbers, HPARAMS row, histogram, figures."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdiff.report import figures
from bayesdiff.report.evidence import evidence_figure
from bayesdiff.report.layout import conditions, conditions_of
from bayesdiff.report.loggers import Loggers
from bayesdiff.report.options import SUM, ReportOptions
from bayesdiff.report.pictures import PICTURES, Figures, Seen
from bayesdiff.report.writer import Curves, flat, new_report, report
from bayesdiff.uncertainty.scores.of_maps_and_images import map_score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesdiff.laplace.evidence_grid import EvidenceCurve
    from bayesdiff.metrics.validation import Validation
    from bayesdiff.uncertainty.samples import Samples


def write(
    writer_dir: str | Path,
    samples: "Samples",
    metrics: Mapping[str, float],
    hparams: Mapping[str, Any],
    classes: Sequence[str],
    *,
    scores: Mapping[str, Tensor] | None = None,
    options: ReportOptions | None = None,
    validation: "Validation | None" = None,
    evidence: "EvidenceCurve | None" = None,
    loggers: Loggers | None = None,
    drawn_by: Figures = PICTURES,
    measured: Mapping[str, Tensor] | None = None,
) -> list[Path]:
    """Write the report of one generated set; an earlier report in the same place is replaced.

    Args:
        writer_dir: TensorBoard folder of the run, shared with the training logger.
        samples: the generated images with their variances.
        metrics: names, conditions included (``fid@10k/classifier``), and values.
        hparams: the row of the HPARAMS tab, nested dictionaries as ``outer.inner``; the captions
            read it too.
        classes: class names.
        scores: ``(B,)`` of each image by name, those that ``options`` asks for; ``map.sum`` is
            computed where it is left out.
        options: what the figures show.
        validation: comparison with a reference, drawn where there is one.
        evidence: over prior_precision, drawn where there is one.
        loggers: that get the same.
        drawn_by: the figures of the samples' space.
        measured: what these have measured beside the samples.

    Returns:
        The PNG files.
    """
    folder = Path(writer_dir)
    shown = options or ReportOptions()
    known = {SUM: map_score(samples, "sum")} if scores is None else scores
    with report(folder, folder.parent / "figures", flat(hparams), loggers, shown.pdf) as board:
        board.scalars(metrics)
        board.hparams_row(metrics)
        board.curves(over_steps(samples))
        board.curves(over_time(samples))
        board.histogram("uncertainty/score", known[shown.chosen_by])
        drawn = (
            *drawn_by.every(Seen(samples, classes, known, shown, hparams, measured or {})),
            *_checked(validation, conditions(samples, hparams), metrics),
        )
        made = [board.picture(tag, figure) for tag, figure in drawn]
        if evidence is not None:
            curve = zip(evidence.prior_precision, evidence.log_evidence, strict=True)
            board.curves({"laplace/log_evidence_over_prior": _over_prior(curve)})
            figure = evidence_figure(evidence, conditions_of(hparams))
            made.append(board.picture("laplace/evidence", figure))
        return made


def write_study(
    writer_dir: str | Path,
    metrics: Mapping[str, float],
    curves: Mapping[str, Iterable[tuple[float, float | None]]],
    made: Iterable[tuple[str, "Figure"]],
    loggers: Loggers | None = None,
    hparams: Mapping[str, Any] | None = None,
    *,
    pdf: bool = True,
) -> list[Path]:
    """Write numbers, curves and figures of a study; an earlier report there is replaced.

    Args:
        writer_dir: TensorBoard folder; ``figures`` lies beside it.
        metrics: names and values.
        curves: points (prior_precision, value) by name, None for a missing value.
        made: tags and figures.
        loggers: that get the same.
        hparams: settings, for these; the study's row in TensorBoard is its cell's.
        pdf: whether each figure is there as PDF as well.

    Returns:
        The PNG files.
    """
    folder = Path(writer_dir)
    figures_dir = folder.parent / "figures"
    with report(folder, figures_dir, flat(hparams or {}), loggers, pdf) as board:
        board.scalars(metrics)
        board.curves({name: _over_prior(points) for name, points in curves.items()})
        return [board.picture(tag, figure) for tag, figure in made]


# What belongs side by side, for the Custom Scalars tab: regular expressions of tags.
_LAYOUT: dict[str, dict[str, list[Any]]] = {
    "scores": {
        "FID": ["Multiline", ["^(sweep/)?fid@"]],
        "inception score": ["Multiline", ["^(sweep/)?is@"]],
        "precision and recall": ["Multiline", ["^(precision|recall)@"]],
    },
    "uncertainty": {
        "summed variance": ["Multiline", ["^(sweep/)?summed_variance/mean"]],
        "ranks against the reference": ["Multiline", ["^(sweep/)?validation/(image|pixel)_rank$"]],
        "network evaluations": ["Multiline", ["^(sweep/)?nfe$"]],
    },
    "Laplace": {
        "effective parameters": ["Multiline", ["^(sweep/)?laplace/effective_parameters"]],
        "evidence over prior_precision": ["Multiline", ["^laplace/log_evidence_over_prior"]],
        "sigma_noise and prior_precision": [
            "Multiline", ["^laplace/(sigma_noise|prior_precision)$"]
        ],
    },
}  # fmt: skip


def write_sweep(
    writer_dir: str | Path,
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    text: str,
    pictures: Mapping[str, Path],
) -> None:
    """Write the report of a sweep; an earlier one there is replaced.

    HPARAMS rows are the cells' own; here they would be there twice.

    Args:
        writer_dir: TensorBoard folder.
        rows: flat, one per cell.
        metrics: drawn over the number of the cell, as ``sweep/...``.
        text: what was swept, in Markdown.
        pictures: saved figures by their headings.
    """
    from matplotlib.image import imread

    with new_report(Path(writer_dir)) as writer:
        writer.add_custom_scalars(_LAYOUT)
        writer.add_text("sweep/table", text)
        for metric in metrics:
            for place, row in enumerate(rows):
                if isinstance(row.get(metric), float | int) and math.isfinite(row[metric]):
                    writer.add_scalar(f"sweep/{metric}", float(row[metric]), place)
        for name, path in pictures.items():
            pixels = torch.from_numpy(imread(path)[..., :3].copy())
            writer.add_image(f"sweep/{name}", pixels, 0, dataformats="HWC")


def _over_prior(points: Iterable[tuple[float | Tensor, Any]]) -> list[tuple[int, float]]:
    """A curve over prior_precision; a step is a tenth of a decade, 0 at prior_precision 1."""
    return [
        (round(10 * math.log10(x)), float(value))
        for x, value in points
        if value is not None and math.isfinite(value)
    ]


def over_steps(samples: "Samples") -> Curves:
    """The mean summed variance after each solver step."""
    # Numbers stay in the model's units, so that those of two runs can be compared.
    summed = samples.in_model_range().summed.mean(1).tolist()
    return {"uncertainty/summed_variance": list(enumerate(summed, start=1))}


def over_time(samples: "Samples") -> Curves:
    """Statistics of the maps over t, their means over images; a step is a thousandth of t.

    Solvers with other numbers of steps are so compared at equal times.
    """
    steps = [round(1000 * time) for time in samples.times.tolist()]
    names = {"summed": "summed_variance", "mean": "mean_variance", "spatial": "spatial_variance"}
    return {
        f"over_t/{names.get(name, name)}": list(zip(steps, values.mean(1).tolist(), strict=True))
        for name, values in samples.in_model_range().over_time.items()
    }


def _checked(
    validation: "Validation | None", made: str, metrics: Mapping[str, float]
) -> list[tuple[str, "Figure"]]:
    """The maps against their reference, where there is one."""
    if validation is None:
        return []
    figure = figures.validation_scatter(validation, made, metrics)
    return [("uncertainty/validation", figure)]

"""One generated set in TensorBoard: metrics, HPARAMS row, score histogram and every figure."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdiff.report import figures
from bayesdiff.report.ablation import evidence_figure
from bayesdiff.report.layout import conditions, conditions_of, image_range
from bayesdiff.report.options import SUM, ReportOptions
from bayesdiff.report.sorted_sheet import Block, sorted_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

    from bayesdiff.laplace.grid import EvidenceCurve
    from bayesdiff.metrics.validation import Validation
    from bayesdiff.uncertainty.samples import Samples

Scalar = float | int | str
SUFFIX = ".report"


def write(
    writer_dir: str | Path,
    samples: "Samples",
    metrics: Mapping[str, float],
    hparams: Mapping[str, Any],
    classes: Sequence[str],
    *,
    scores: Mapping[str, Tensor] | None = None,
    options: ReportOptions | None = None,
    settings: Mapping[str, Any] | None = None,
    figures_dir: str | Path | None = None,
    validation: "Validation | None" = None,
    evidence: "EvidenceCurve | None" = None,
) -> list[Path]:
    """Write the report of one generated set; an earlier report in the same place is replaced.

    Args:
        writer_dir: TensorBoard folder of the run, shared with the training logger.
        samples: the generated images with their variances.
        metrics: names, conditions included (``fid@10k/classifier``), and values.
        hparams: the row of the HPARAMS tab; nested dictionaries become ``outer.inner``.
        classes: class names.
        scores: ``(B,)`` of each image by name, those that ``options`` asks for; the summed
            variance is known anyway.
        options: what the figures show.
        settings: of the run, for the captions; ``hparams`` when left out.
        figures_dir: folder of the figures; ``figures`` beside ``writer_dir`` when left out.
        validation: comparison with a reference, drawn where there is one.
        evidence: over prior_precision, drawn where there is one.

    Returns:
        The PNG files.
    """
    folder = Path(writer_dir)
    pictures = folder.parent / "figures" if figures_dir is None else Path(figures_dir)
    shown = options or ReportOptions()
    known = {SUM: samples.variance.flatten(1).sum(1), **(scores or {})}
    given = hparams if settings is None else settings
    with _new_report(folder) as writer:
        _numbers(writer, samples, metrics, known[shown.chosen_by])
        _hparams_row(writer, flat(hparams), metrics)
        made = [
            _picture(writer, tag, figure, pictures, shown.pdf)
            for tag, figure in (
                *_pictures(samples, classes, known, shown, given),
                *_checked(validation, conditions(samples, given), metrics),
            )
        ]
        if evidence is not None:
            curve = zip(evidence.prior_precision, evidence.log_evidence, strict=True)
            _curve(writer, "laplace/log_evidence_over_prior", curve)
            figure = evidence_figure(evidence, conditions_of(given))
            made.append(_picture(writer, "laplace/evidence", figure, pictures, shown.pdf))
        return made


def write_study(
    writer_dir: str | Path,
    metrics: Mapping[str, float],
    curves: Mapping[str, Iterable[tuple[float, float | None]]],
    made: Iterable[tuple[str, "Figure"]],
    *,
    pdf: bool = True,
) -> list[Path]:
    """Write numbers, curves and figures of a study; an earlier report there is replaced.

    Args:
        writer_dir: TensorBoard folder; ``figures`` lies beside it.
        metrics: names and values.
        curves: points (prior_precision, value) by name, None for a missing value.
        made: tags and figures.
        pdf: whether each figure is there as PDF as well.

    Returns:
        The PNG files.
    """
    folder = Path(writer_dir)
    with _new_report(folder) as writer:
        for name, value in metrics.items():
            writer.add_scalar(name, float(value), 0)
        for name, points in curves.items():
            _curve(writer, name, points)
        figures_dir = folder.parent / "figures"
        return [_picture(writer, tag, figure, figures_dir, pdf) for tag, figure in made]


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

    with _new_report(Path(writer_dir)) as writer:
        writer.add_custom_scalars(_LAYOUT)
        writer.add_text("sweep/table", text)
        for metric in metrics:
            for place, row in enumerate(rows):
                if isinstance(row.get(metric), float | int) and math.isfinite(row[metric]):
                    writer.add_scalar(f"sweep/{metric}", float(row[metric]), place)
        for name, path in pictures.items():
            pixels = torch.from_numpy(imread(path)[..., :3].copy())
            writer.add_image(f"sweep/{name}", pixels, 0, dataformats="HWC")


def _new_report(folder: Path) -> "SummaryWriter":
    """A writer in place of an earlier report's: two of one run would draw every value twice."""
    from torch.utils.tensorboard import SummaryWriter

    for earlier in folder.glob(f"*{SUFFIX}"):
        earlier.unlink()
    return SummaryWriter(str(folder), filename_suffix=SUFFIX)


def _curve(
    writer: "SummaryWriter", name: str, points: Iterable[tuple[float | Tensor, Any]]
) -> None:
    """A curve over prior_precision; a step is a tenth of a decade, 0 at prior_precision 1."""
    for x, value in points:
        if value is not None and math.isfinite(value):
            writer.add_scalar(name, float(value), round(10 * math.log10(x)))


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Scalars for the HPARAMS tab: dotted keys; flags, lists and None as text."""
    row: dict[str, Scalar] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            row.update(flat(value, f"{name}."))
        elif isinstance(value, bool) or value is None:
            # TensorBoard would show a flag as 1.0 and leave None out.
            row[name] = {True: "true", False: "false", None: "null"}[value]
        else:
            row[name] = value if isinstance(value, (int, float, str)) else str(value)
    return row


def _numbers(
    writer: "SummaryWriter", samples: "Samples", metrics: Mapping[str, float], scores: Tensor
) -> None:
    """Scalars, the summed variance after each solver step, and the histogram of the scores."""
    for name, value in metrics.items():
        writer.add_scalar(name, float(value), 0)
    # Numbers stay in the model's units, so that those of two runs can be compared.
    scale = 4 if samples.units == "unit" else 1
    for step, value in enumerate((scale * samples.summed).mean(1).tolist(), start=1):
        writer.add_scalar("uncertainty/summed_variance", value, step)
    finite = scores[scores.isfinite()]
    if len(finite):
        writer.add_histogram("uncertainty/score", finite, 0)


def _hparams_row(
    writer: "SummaryWriter", row: dict[str, Scalar], metrics: Mapping[str, float]
) -> None:
    """Hyperparameters in this event file; ``add_hparams`` would make a run of its own.

    The list of columns that goes with them is left out: TensorBoard shows the columns of the first
    list it meets, and every run that has other options or metrics would lose its own. Without
    lists it collects the columns of all runs.
    """
    from torch.utils.tensorboard.summary import hparams

    _columns, start, end = hparams(row, {name: float(value) for name, value in metrics.items()})
    for summary in (start, end):
        writer._get_file_writer().add_summary(summary)


def _pictures(
    samples: "Samples",
    classes: Sequence[str],
    scores: Mapping[str, Tensor],
    shown: ReportOptions,
    settings: Mapping[str, Any],
) -> Iterator[tuple[str, "Figure"]]:
    """The figures of a set of samples, made when asked for: large figures are not kept.

    Yields:
        Tag and figure.
    """
    made, values = conditions(samples, settings), scores[shown.chosen_by]
    name = "summed variance" if shown.chosen_by == SUM else shown.chosen_by
    look: dict[str, Any] = {"settings": settings, "own_scale": shown.map_scale == "own"}
    grid = samples.images, samples.labels, classes, 10, made, samples.units
    yield "samples/samples", figures.sample_grid(*grid)
    yield "uncertainty/image_and_map", figures.image_and_map(samples, classes, **look)
    yield "uncertainty/over_time", figures.over_time(samples, classes, settings=settings)
    yield "uncertainty/summed_over_time", figures.summed_over_time(samples, classes, settings)
    unit = f" (images in {image_range(samples)})" if shown.chosen_by == SUM else ""
    histogram = values, samples.labels, classes, made, name + unit
    yield "uncertainty/scores", figures.score_histogram(*histogram)
    ends = figures.extremes(samples, classes, scores=values, name=name, **look)
    yield "uncertainty/extremes", ends
    if shown.sorted_by:
        blocks = [Block(n, samples.images, scores[n], samples.units) for n in shown.sorted_by]
        yield "uncertainty/sorted", sorted_images(blocks, made)


def _checked(
    validation: "Validation | None", made: str, metrics: Mapping[str, float]
) -> list[tuple[str, "Figure"]]:
    """The maps against their reference, where there is one."""
    if validation is None:
        return []
    figure = figures.validation_scatter(validation, made, metrics)
    return [("uncertainty/validation", figure)]


def _picture(writer: "SummaryWriter", tag: str, figure: "Figure", folder: Path, pdf: bool) -> Path:
    """Save ``figure`` and put the same pixels on the board, so that it is drawn only once."""
    from matplotlib.image import imread

    path = figures.save(figure, folder / f"{tag.split('/')[-1]}.png", pdf=pdf)
    writer.add_image(tag, torch.from_numpy(imread(path)[..., :3].copy()), 0, dataformats="HWC")
    return path

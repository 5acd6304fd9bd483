"""Curves over time, calibration and detection; each carries its conditions in its caption."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesdiff.report.layout import chart
from bayesdiff.report.style import look, style
from bayesdiff.studies.beliefs.results import PREDICTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAND = "95 % bootstrap intervals over images"
_NAMES = {
    "belief": "belief", "entropy": "output", "epistemic": "epistemic",
    "trained": "trained head", "averaged": "averaged over its posterior",
}  # fmt: skip


@style()
def over_time(record: Mapping[str, Any], conditions: str = "") -> "Figure":
    """Mean entropies along the sampler and of held-out images, and by how much they differ."""
    rows, about = record["curve"], record["conditions"]
    caption = (
        f"Sampler: {about['num_samples']} samples of {about['num_steps']} steps. Held-out: "
        f"beliefs that received {about['num_samples']} held-out images, at the same t. A perfect "
        "model and sampler make both alike; right: their difference. Bands: "
        f"{_BAND}. {conditions}"
    )
    figure, panels = chart(1100, 430, "Entropies over time", caption, 1, 2)
    times, left, right = _all(rows, "t"), panels[0, 0], panels[0, 1]
    for place, name in enumerate(("belief", "entropy")):
        for side, source in enumerate(("sampler", "held_out")):
            how = look(place) | {"linestyle": ("-", "--")[side], "marker": "o^"[side]}
            how |= {"markevery": (side * max(1, len(times) // 20), max(1, len(times) // 10))}
            title = f"{_NAMES[name]}, {source.replace('_', '-')}"
            _line(left, times, rows, f"{source}.{name}", title, how)
        how = look(place) | {"markevery": max(1, len(times) // 10)}
        _line(right, times, rows, f"difference.{name}", _NAMES[name], how)
    left.set(xlabel="t", ylabel="mean entropy, nats per pixel", xlim=(0, 1))
    left.set_ylim(bottom=0)
    right.axhline(0, color="0.3", linewidth=0.8)
    right.set(xlabel="t", ylabel="sampler minus held-out, nats per pixel", xlim=(0, 1))
    left.legend(), right.legend()
    return figure


@style()
def decomposition(record: Mapping[str, Any], conditions: str = "") -> "Figure":
    """What the data leave open and what the weights do, on held-out images over t."""
    rows, about = record["bins"], record["conditions"]
    caption = (
        f"{about['num_images']} held-out images, one t in each interval. Total: entropy of the "
        "output averaged over the posterior of the head, = aleatoric + epistemic. Bands: "
        f"{_BAND}. {conditions}"
    )
    figure, panels = chart(1100, 430, "Total, aleatoric and epistemic", caption, 1, 2)
    left, right, middle = panels[0, 0], panels[0, 1], _middle(rows)
    for place, name in enumerate(("belief", "total", "aleatoric")):
        _line(left, middle, rows, name, _NAMES.get(name, name), look(place))
    _line(right, middle, rows, "epistemic", "epistemic", look(3))
    left.set(xlabel="t", ylabel="nats per pixel", xlim=(0, 1))
    right.set(xlabel="t", ylabel="epistemic, nats per pixel", xlim=(0, 1))
    left.set_ylim(bottom=0), right.set_ylim(bottom=0)
    left.legend()
    return figure


@style()
def calibration(record: Mapping[str, Any], conditions: str = "") -> "Figure":
    """Reliability over all times, and errors and scores over t."""
    rows, about = record["bins"], record["conditions"]
    caption = (
        f"{about['num_images']} held-out images, one t in each interval. Reliability: pixels by "
        "the larger probability of their output, over all t. ECE: its mean distance from the "
        "diagonal, which few images make larger; NLL in nats per pixel. "
        f"Bands: {_BAND}. {conditions}"
    )
    figure, panels = chart(1500, 420, "Calibration of the output", caption, 1, 3)
    first = panels[0, 0]
    for place, name in enumerate(PREDICTIONS):
        levels = record["reliability"][name]
        size = {"markersize": 5 if place else 7, "markerfacecolor": "none" if place else None}
        first.plot(
            _all(levels, "confidence"), _all(levels, "right"), label=_NAMES[name],
            **(look(place) | {k: v for k, v in size.items() if v is not None}),
        )  # fmt: skip
        for panel, figure_ in ((panels[0, 1], "ece"), (panels[0, 2], "nll")):
            _line(panel, _middle(rows), rows, f"{name}.{figure_}", _NAMES[name], look(place))
    first.axline((1, 1), slope=1, color="0.3", linestyle="--", linewidth=0.8)
    first.set(xlabel="probability of the likelier class", ylabel="share that is right")
    panels[0, 1].set(xlabel="t", ylabel="expected calibration error", xlim=(0, 1))
    panels[0, 2].set(xlabel="t", ylabel="negative log-likelihood, nats per pixel", xlim=(0, 1))
    for panel in panels[0, 1:]:
        panel.set_ylim(bottom=0)
    first.legend()
    return figure


@style()
def detection(record: Mapping[str, Any], conditions: str = "") -> "Figure":
    """AUROC over t: for wrong pixels of held-out images, and for images of other data."""
    rows, about = record["bins"], record["conditions"]
    shift = about["shift"]
    more = (
        f" Right: do shifted images ({shift}, {about['num_images']} of them) have the higher mean "
        "over pixels, against as many held-out ones."
        if shift
        else ""
    )
    caption = (
        f"Left: do pixels that the output gets wrong have the higher score, among all pixels of "
        f"{about['num_images']} held-out images at times of an interval.{more} Dashed: chance. "
        f"Bands: {_BAND}. {conditions}"
    )
    kinds = {"wrong_pixels": "AUROC, wrong pixels"}
    kinds |= {"shift": f"AUROC, {shift} against held-out"} if shift else {}
    title = "Finding wrong pixels and other data"
    figure, panels = chart(550 * len(kinds), 430, title, caption, 1, len(kinds))
    for panel, (kind, label) in zip(panels[0], kinds.items(), strict=True):
        for place, score in enumerate(("belief", "entropy", "epistemic")):
            name = f"{score}.auroc_{kind}"
            _line(panel, _middle(rows), rows, name, _NAMES[score], look(place))
        panel.axhline(0.5, color="0.3", linestyle="--", linewidth=0.8)
        panel.set(xlabel="t", ylabel=label, xlim=(0, 1))
    panels[0, 0].legend()
    return figure


def _line(
    panel: "Axes", x: np.ndarray, rows: Sequence[Mapping[str, Any]], name: str, title: str,
    how: Mapping[str, Any],
) -> None:  # fmt: skip
    """A curve with its band."""
    panel.plot(x, _all(rows, name), label=title, **how)
    low, high = _all(rows, f"{name}_low"), _all(rows, f"{name}_high")
    panel.fill_between(x, low, high, color=how["color"], alpha=0.2, linewidth=0)


def _all(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)


def _middle(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return (_all(rows, "t_low") + _all(rows, "t_high")) / 2

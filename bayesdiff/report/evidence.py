"""The figure of a posterior's evidence over prior_precision."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bayesdiff.report.layout import chart
from bayesdiff.report.style import look, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayesdiff.laplace.evidence_grid import EvidenceCurve


@style()
def evidence_figure(curve: "EvidenceCurve", conditions: str = "") -> "Figure":
    """Log evidence and effective parameters over prior_precision, with what matters marked.

    Args:
        curve: of a posterior.
        conditions: what it is of, for the caption.
    """
    low, high = curve.eigenvalues
    known = (
        "below them the prior decides nothing, above them everything"
        if low > 0
        else "where they are 0 the prior decides alone"
    )
    caption = (
        f"sigma_noise {curve.sigma_noise:.4g}. The head's precision from the data has eigenvalues "
        f"from {low:.3g} to {high:.3g} (dashed): {known}."
    )
    caption += f" {conditions}." if conditions else ""
    figure, panels = chart(640, 520, "Evidence of the prior", caption, 2, 1, sharex=True)
    taus, (top, bottom) = curve.prior_precision.numpy(), panels[:, 0]
    evidence = curve.log_evidence.numpy()
    top.plot(taus, evidence)
    for (tau, value), name, place in ((curve.best, "best", 1), (curve.own, "this run", 2)):
        how = look(place) | {"linestyle": "none", "markersize": 7}
        top.plot(tau, value, label=f"{name}: {tau:.4g}", **how)
    # A prior far too strong costs without bounds and would flatten all else.
    left = evidence[np.isfinite(evidence)][:1]
    floor = min([*left.tolist(), curve.own[1]])
    room = 0.08 * (curve.best[1] - floor) or 1.0
    top.set(ylabel="log evidence", ylim=(floor - room, curve.best[1] + room), xscale="log")
    top.ticklabel_format(axis="y", style="plain", useOffset=False)  # else behind the legend
    top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    bottom.plot(taus, curve.effective_parameters.numpy() / curve.parameters)
    mark_eigenvalues(bottom, curve.eigenvalues, (taus.min(), taus.max()))
    bottom.set(xlabel="prior_precision", ylabel="effective\nparameters over P", ylim=(-0.03, 1.05))
    return figure


def mark_eigenvalues(
    axes: "Axes", ends: Sequence[float], limits: tuple[float, float] | None = None
) -> None:
    """Thin lines at the smallest and the largest eigenvalue, where they lie on the axis."""
    for value in ends:
        if value > 0 and (limits is None or limits[0] <= value <= limits[1]):
            axes.axvline(value, color="0.4", linewidth=0.8, linestyle="--")

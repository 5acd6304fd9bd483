"""Which score to rely on, chosen on all pools but the last and judged on that one."""

from collections.abc import Collection, Sequence
from typing import Any

from bayesdiff.metrics.seeds import over_seeds
from bayesdiff.studies.filtering.gains import NAMES, Row

# Kinds of scores that do not look at the posterior.
OTHERS = (
    *("random", "image", "aleatoric", "likelihood", "classifier", "real"),
    "sampler_noise",
)


def choice(
    tables: Sequence[Sequence[Row]], keep: float, rivals: Collection[str]
) -> dict[str, Any]:
    """The best of the scores that read the posterior, and how far it leads every other.

    Args:
        tables: rows of ``gains`` of each seed, two seeds or more.
        keep: share at which is chosen, within classes where there are any.
        rivals: names of maps and scores that cannot be chosen, as the scores in ``OTHERS`` and
            the published semantic ones cannot.

    Returns:
        ``best``, the score with the best mean z over all seeds but the last; ``best_on_last``, its
        rows on the last seed; ``best_over``, by how much its FID is below that of every other
        score: ``lead`` over all seeds, of which the choice has seen all but one, with its
        interval, and ``lead_on_last``.
    """
    mode = tables[0][-1]["mode"]
    main = [[row for row in rows if (row["mode"], row["keep"]) == (mode, keep)] for rows in tables]
    seen = over_seeds(main[:-1], NAMES, ["z"])
    ours = [row for row in seen if _ours(row["score"], rivals)]
    best = max(ours, key=lambda row: row["z"])["score"]
    over = over_seeds([_leads(rows, best) for rows in main], ["score"], ["lead"])
    on_last = {row["score"]: row["lead"] for row in _leads(main[-1], best)}
    return {
        "best": best,
        "best_on_last": [row for row in tables[-1] if row["score"] == best],
        "best_over": [row | {"lead_on_last": on_last[row["score"]]} for row in over],
    }


def _ours(score: str, rivals: Collection[str]) -> bool:
    """Whether a score reads the posterior and is no published one."""
    kind, _, name = score.partition(".")
    return not {kind, score} & {*OTHERS, *rivals} and not name.startswith("semantic")


def _leads(rows: Sequence[Row], best: str) -> list[Row]:
    """By how much the FID that one score leaves is below that of every other, on one pool."""
    own = next(row["fid"] for row in rows if row["score"] == best)
    return [{"score": row["score"], "lead": row["fid"] - own} for row in rows]

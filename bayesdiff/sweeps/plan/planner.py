"""A dry run: what every cell would make, what is there, what finished runs took for the rest.

Nothing is written, and nothing is estimated: times and memory are those of finished runs in the
same output_dir, in the same place.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bayesdiff.machine.progress import duration
from bayesdiff.report import table
from bayesdiff.runs.stage_costs import Cost, cost_of, records_in
from bayesdiff.sweeps.plan.cells import STAGES, Cell, Work, look
from bayesdiff.sweeps.report import flatten, swept_keys


def show(given: Sequence[tuple[Sequence[str], DictConfig]]) -> list[str]:
    """Print the plan: a row for each cell, then the totals.

    Args:
        given: overrides and configuration of every cell.

    Returns:
        One line for each cell that is refused.
    """
    totals = _Totals()
    rough = [{"overrides": overrides, "status": "", "seconds": 0} for overrides, _ in given]
    keys = swept_keys(rough) if len(given) > 1 else []
    rows, errors = [], []
    for place, (overrides, cfg) in enumerate(given):
        cell = look(overrides, cfg)  # one at a time: each holds its data
        flat = flatten(rough[place], keys)
        rows.append({"cell": place} | {key: flat[key] for key in keys} | totals.add(cell))
        errors += [f"cell {place}: {cell.error}"] if cell.error else []
    there = dict.fromkeys(work.stage for works in totals.works for work in works)
    stages = sorted(there, key=lambda stage: [*STAGES, stage].index(stage))
    columns = ["cell", *keys, *stages, "time", "memory", *(["refused"] if errors else [])]
    table.show("plan: nothing is made or written", rows, columns)
    table.show("in all", totals.rows())
    return errors


class _Totals:
    """What the cells have in common, cell by cell."""

    def __init__(self) -> None:
        self.first: dict[str, int] = {}  # cell that makes it
        self.works: list[tuple[Work, ...]] = []
        self.costs: list[Cost | None] = []  # of everything to be made; None for not known
        self.refused = 0
        self.scaled: dict[str, str] = {}  # stages, and by what
        self.unknown: dict[str, None] = {}  # stages that no finished run had
        self.studies: dict[str, None] = {}  # those to be made
        self._records: dict[Path, list[dict[str, Any]]] = {}

    def add(self, cell: Cell) -> dict[str, Any]:
        """Columns of the cell's row."""
        place, before = len(self.works), len(self.costs)
        self.works.append(cell.works)
        if cell.error:
            self.refused += 1
            return {"time": "", "memory": "", "refused": cell.error}
        row: dict[str, Any] = {}
        for work in cell.works:
            first = self.first.setdefault(f"{work.stage} {work.key}", place)
            if work.made or first != place:
                row[work.stage] = "made" if work.made else f"with cell {first}"
            else:
                row[work.stage] = self._cost(cell, work)
        return row | _sums(self.costs[before:])

    def _cost(self, cell: Cell, work: Work) -> str:
        """What finished runs took for it."""
        kind, cost = cell.kinds.get(work.stage), None
        if kind is not None:
            records = self._finished(cell)
            cost = cost_of(work.stage, kind, cell.place, records, work.share)
        self.costs.append(cost)
        if cost is None:
            (self.studies if kind is None else self.unknown)[work.stage] = None
            return "not known"
        if cost.scale != 1:
            self.scaled[work.stage] = cost.unit
        return duration(cost.seconds) + (" to go" if work.share < 1 else "")

    def _finished(self, cell: Cell) -> list[dict[str, Any]]:
        """Records of the runs in the cell's output_dir, and of its own."""
        own, output_dir = cell.folders
        if output_dir not in self._records:
            self._records[output_dir] = records_in(sorted(output_dir.glob("*")))
        if own.parent == output_dir:
            return self._records[output_dir]
        return self._records[output_dir] + records_in([own])

    def rows(self) -> list[dict[str, Any]]:
        """The closing table."""
        made = sum(bool(works) and all(work.made for work in works) for works in self.works)
        trainings = {w.key: w.made for works in self.works for w in works if w.stage == "training"}
        missing = len(trainings) - sum(trainings.values())
        sums = _sums(self.costs)
        rows = {
            "cells": f"{len(self.works)}: {made} made before, {self.refused} refused",
            "trainings": f"{len(trainings)}: {missing} to be made",
            "time, 1 worker": sums["time"],
            "memory of a worker": sums["memory"],
        }
        if self.scaled:
            by = ", ".join(f"{stage} by {unit}" for stage, unit in self.scaled.items())
            rows["scaled"] = f"{by}, from runs of another size"
        if self.unknown:
            rows["not known"] = f"{', '.join(self.unknown)}: no finished run of this kind yet"
        if self.studies:
            rows["not recorded"] = (
                f"{', '.join(self.studies)}: it depends on what others have left"
            )
        return [{"what": name, "value": value} for name, value in rows.items()]


def _sums(costs: Sequence[Cost | None]) -> dict[str, str]:
    """Time and memory of all; of those that are known, where some are not."""
    known = [cost for cost in costs if cost is not None]
    if costs and not known:
        return {"time": "not known", "memory": "not known"}
    more = " or more" if len(known) < len(costs) else ""
    memory = max((cost.memory for cost in known), default=0.0)
    return {
        "time": duration(sum(cost.seconds for cost in known)) + more,
        "memory": f"{memory:.2g} GiB" + more if known else "",
    }

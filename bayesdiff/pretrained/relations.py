"""From a trace of a scheduler to steps: the shortest affine relation between its states."""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.pretrained.loop import Trace
from bayesdiff.solvers.step import Row, Step

# What a state depends on: ("x", k) and ("g", k) k evaluations ago or a combination ("k", k) of
# them, and its own noise ("z", 0).
Term = tuple[str, int]
Relation = dict[Term, float]
Pair = tuple[float, float]
_REACH = 16
_FLOOR = 1e-14


@dataclass(frozen=True)
class _Fit:
    weights: dict[Term, float]
    residual: float


def alternatives(trace: Trace, tolerance: float) -> list[list[Relation]]:
    """Affine relations of all steps, each list a way of its own of writing the whole loop.

    A deterministic state says again what earlier ones and the outputs said, so that many
    relations hold; they differ in what has to be kept. The lists are: over outputs and states as
    few steps back as possible, over earlier outputs alone, and over one combination of state
    and output for each earlier step. Ways that do not exist are left out.

    Args:
        trace: of the scheduler's loop.
        tolerance: of a residual, relative to the states.
    """
    free = _relations(trace, tolerance, None)
    if free is None:
        return []
    if all(k == 0 for found in free for _, k in found):
        return [free]
    ways = [_relations(trace, tolerance, each) for each in (_outputs(free), _last_read(free))]
    return [free, *(way for way in ways if way is not None)]


def _outputs(free: list[Relation]) -> list[Pair]:
    return [(0.0, 1.0)] * len(free)


def _last_read(free: list[Relation]) -> list[Pair]:
    """The combination of every state and output that the last step to read them reads."""
    last = _outputs(free)
    for place, found in enumerate(free):
        for k in {k for _, k in found if k > 0}:
            pair = found.get(("x", k), 0.0), found.get(("g", k), 0.0)
            size = math.hypot(*pair)
            last[place - k] = pair[0] / size, pair[1] / size
    return last


def _relations(trace: Trace, tolerance: float, pairs: list[Pair] | None) -> list[Relation] | None:
    """Relations of all steps over combinations (p, q) of earlier states and outputs, or both."""
    relations: list[Relation] = []
    for place in range(len(trace.outputs)):
        found = _relation(trace, place, tolerance, pairs)
        if found is None:
            return None
        relations.append(found)
    return relations


def _relation(
    trace: Trace, place: int, tolerance: float, pairs: list[Pair] | None
) -> Relation | None:
    """Fewest terms that give x_(i+1) exactly, reaching back as little as possible."""
    columns = {("x", 0): trace.states[place], ("g", 0): trace.outputs[place]}
    drawn = trace.noise[place]
    if drawn is not None:
        columns["z", 0] = drawn
    target = trace.states[place + 1]
    scale = max(_size(target), _size(trace.states[place]))
    for reach in range(min(place, _REACH) + 1):
        if reach:
            j = place - reach
            x, g = trace.states[j], trace.outputs[j]
            if pairs is None:
                columns.update({("x", reach): x, ("g", reach): g})
            else:
                columns["k", reach] = pairs[j][0] * x + pairs[j][1] * g
        fit = _fit(columns, target)
        if fit.residual <= tolerance * scale:
            found = _pruned(columns, target, fit, _FLOOR * scale).weights
            return found if pairs is None else _opened(found, place, pairs)
    return None


def _opened(found: Relation, place: int, pairs: list[Pair]) -> Relation:
    """Weights of combinations as those of states and outputs."""
    relation: Relation = {}
    for (kind, k), weight in found.items():
        if kind == "k":
            p, q = pairs[place - k]
            relation.update({("x", k): weight * p} if p else {})
            relation.update({("g", k): weight * q} if q else {})
        else:
            relation[kind, k] = weight
    return relation


def _size(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _fit(columns: dict[Term, Tensor], target: Tensor) -> _Fit:
    """Least squares over the pixels."""
    if not columns:
        return _Fit({}, _size(target))
    sizes = torch.tensor([_size(column) or 1.0 for column in columns.values()]).double()
    matrix = torch.stack([column.flatten() for column in columns.values()], 1) / sizes
    y = target.flatten()
    weights = torch.linalg.lstsq(matrix, y[:, None], driver="gelsd").solution[:, 0]
    # Once more for the residual, which gives the last digits.
    rest = y - matrix @ weights
    weights = weights + torch.linalg.lstsq(matrix, rest[:, None], driver="gelsd").solution[:, 0]
    residual = _size(y - matrix @ weights)
    return _Fit(dict(zip(columns, (weights / sizes).tolist(), strict=True)), residual)


def _pruned(columns: dict[Term, Tensor], target: Tensor, fit: _Fit, floor: float) -> _Fit:
    """Without the terms that it does not need, the oldest tried first, states before outputs."""
    allowed = max(4 * fit.residual, floor)
    for term in sorted(columns, key=lambda term: (-term[1], "xgkz".index(term[0]))):
        rest = {key: column for key, column in columns.items() if key != term}
        trial = _fit(rest, target)
        if trial.residual <= allowed:
            columns, fit = rest, trial
    return fit


def assembled(
    trace: Trace,
    relations: list[Relation],
    times: list[float],
    sign: float,
    tolerance: float,
) -> list[Step]:
    """Steps of the relations, in states that are the network's inputs.

    Args:
        trace: of the scheduler's loop.
        relations: one for each evaluation.
        times: of the evaluations, and of the end.
        sign: what the network's output is multiplied by before the scheduler sees it.
        tolerance: of rounding.
    """
    count = len(relations)
    # x_i = size_i w_i, with w_0 the standard normal noise and w_i the network's input.
    sizes = [trace.start, *(1 / scale for scale in trace.scales[1:]), 1.0]
    scaled = [
        {
            (kind, k): _round(weight * unit / sizes[i + 1], tolerance)
            for (kind, k), weight in found.items()
            for unit in [{"x": sizes[i - k], "g": sign, "z": 1.0}[kind]]
        }
        for i, found in enumerate(relations)
    ]
    keeps, reads = _kept(scaled, tolerance)
    first = _round(trace.scales[0] * trace.start, tolerance)
    return [
        Step(
            times=(times[i],),
            inputs=((first if i == 0 else 1.0,),),
            output=(scaled[i].get(("x", 0), 0.0), scaled[i].get(("g", 0), 0.0)),
            noise=scaled[i].get(("z", 0), 0.0),
            end=times[i + 1],
            kept=keeps[i],
            history=_history(reads[i], keeps, i),
        )
        for i in range(count)
    ]


def _round(value: float, tolerance: float) -> float:
    return 1.0 if abs(value - 1) <= tolerance else value


Reads = dict[int, tuple[float, ...]]


def _kept(scaled: list[Relation], tolerance: float) -> tuple[list[tuple[Row, ...]], list[Reads]]:
    """What every step keeps, and with which weights later ones read it.

    A step keeps its output, its state or one combination of them where that serves all later
    steps, and otherwise both.
    """
    pairs: dict[int, dict[int, Pair]] = defaultdict(dict)
    for i, found in enumerate(scaled):
        for k in {k for kind, k in found if k > 0}:
            pairs[i - k][i] = (found.get(("x", k), 0.0), found.get(("g", k), 0.0))
    keeps: list[tuple[Row, ...]] = []
    reads: list[Reads] = [{} for _ in scaled]
    for j in range(len(scaled)):
        rows, weights = _rows(pairs[j], tolerance)
        keeps.append(rows)
        for i, row in weights.items():
            reads[i][j] = row
    return keeps, reads


def _rows(
    pairs: dict[int, Pair], tolerance: float
) -> tuple[tuple[Row, ...], dict[int, tuple[float, ...]]]:
    """Rows that span the pairs, and every pair in terms of them."""
    if not pairs:
        return (), {}
    p, q = max(pairs.values(), key=lambda pair: pair[0] ** 2 + pair[1] ** 2)
    square = p * p + q * q
    if all(abs(a * q - b * p) <= tolerance * square for a, b in pairs.values()):
        row = (0.0, 1.0) if p == 0 else (1.0, 0.0) if q == 0 else (p, q)
        square = row[0] ** 2 + row[1] ** 2
        weights = {i: (a * row[0] + b * row[1]) / square for i, (a, b) in pairs.items()}
        return (row,), {i: (_round(weight, tolerance),) for i, weight in weights.items()}
    return ((1.0, 0.0), (0.0, 1.0)), dict(pairs)


def _history(reads: Reads, keeps: list[tuple[Row, ...]], place: int) -> Row:
    """Weights of k_0, k_1, ..., which are what the steps before kept, the latest first."""
    history: list[float] = []
    for j in range(place - 1, min(reads, default=place) - 1, -1):
        history += reads.get(j, (0.0,) * len(keeps[j]))
    return tuple(history)

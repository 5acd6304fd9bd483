"""Which images a user calls bad: a CSV of sample numbers, read and checked before any work."""

import csv
from collections.abc import Collection
from pathlib import Path

from bayesdiff.checks import UserError, few

# Whether an image is bad, by its number, by the seed of its pool.
Labels = dict[int, dict[int, bool]]
_COLUMNS = ("number", "bad")
_LIKE = "a first line such as number,bad or seed,number,bad"


def read_labels(path: str, seeds: Collection[int], num_images: int) -> Labels:
    """The labels of a file.

    Args:
        path: of a CSV with a header: ``number`` of the sample, ``bad`` 0 or 1, and ``seed`` of its
            pool, without which all are of the first.
        seeds: of the pools, the one that calibrates first.
        num_images: of every pool.

    Raises:
        UserError: one line that names file, line, value and cure.
    """
    file = Path(path)
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.reader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"filtering.labels={path} cannot be read as CSV: {error}; give {_LIKE}"
        ) from error
    header = [name.strip() for name in rows[0]] if rows else []
    if not {*_COLUMNS} <= {*header} or len({*header}) < len(header):
        raise UserError(f"filtering.labels={path}, line 1 has columns {header}; give {_LIKE}")
    found: Labels = {}
    for line, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        where = f"filtering.labels={path}, line {line}"
        if len(row) != len(header):
            raise UserError(f"{where} has {len(row)} values for {len(header)} columns; mend it")
        given = dict(zip(header, row, strict=True))
        bad = _whole(where, "bad", given["bad"], (0, 1), "0 or 1")
        every = f"a number below filtering.num_images={num_images}"
        number = _whole(where, "number", given["number"], range(num_images), every)
        own = f"one of filtering.seeds={list(seeds)}"
        seed = _whole(where, "seed", given.get("seed", str(next(iter(seeds)))), seeds, own)
        if number in found.setdefault(seed, {}):
            raise UserError(f"{where} has number={number} of seed {seed} again; give it once")
        found[seed][number] = bool(bad)
    return found


def require_labels(path: str, labels: Labels, seeds: Collection[int]) -> None:
    """Refuse labels of which none belong to the pool that calibrates.

    Raises:
        UserError: if there are none.
    """
    first = next(iter(seeds))
    if not labels.get(first):
        there = few(sorted(labels)) or "none"
        raise UserError(
            f"filtering.labels={path} has no image of seed {first}, the first of filtering.seeds, "
            f"which calibrates (seeds there: {there}); label some, or give its seed first"
        )


def _whole(where: str, name: str, text: str, there: Collection[int], cure: str) -> int:
    """The number in a cell, one of these."""
    word = text.strip()
    value = int(word) if word.isascii() and word.isdigit() and len(word) < 20 else None
    if value is None or value not in there:
        raise UserError(f"{where} has {name}={text!r}; give {cure}")
    return value

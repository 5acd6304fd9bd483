"""Which part of an image is resampled: by its map, by one box, or by a box of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.studies.repair.alternatives import box_region, map_region

Box = Sequence[int]
Region = str | Box | Mapping[int, Box] | None
KINDS = (
    "null, map, [top,left,height,width], a mapping {number: [top,left,height,width]} of images, "
    "or a YAML or JSON file of one"
)


def region_of(given: Any) -> Region:
    """What ``repair.region`` asks for; a file is read.

    Raises:
        UserError: for anything that is no region.
    """
    if given is None or given == "map":
        return None if given is None else "map"
    if isinstance(given, str):
        given = _read(given)
        if not isinstance(given, Mapping):
            raise UserError(f"repair.region must be {KINDS}, got a file of {given!r}")
    if isinstance(given, Mapping):
        if not given:
            raise UserError("repair.region={} names no image; give {number: box}, or null")
        found = {_number(name): _box(f"repair.region[{name}]", b) for name, b in given.items()}
        if len(found) < len(given):
            raise UserError(f"repair.region={dict(given)} names an image twice; give each once")
        return found
    return _box("repair.region", given)


def boxes_of(region: Region) -> list[Box]:
    """All boxes there are."""
    if region is None or isinstance(region, str):
        return []
    return list(region.values()) if isinstance(region, Mapping) else [region]


def mask_of(region: Region, part: float, variance: Tensor, numbers: Sequence[int]) -> Tensor:
    """``(B, 1, H, W)`` bool, true where images are resampled.

    Args:
        region: as ``region_of`` has it.
        part: of the pixels that ``map`` takes.
        variance: maps of the images, ``(B, C, H, W)``.
        numbers: of the images among the samples.
    """
    if region is None:
        return torch.ones_like(variance[:, :1], dtype=torch.bool)
    if isinstance(region, str):
        return map_region(variance, part)
    if isinstance(region, Mapping):
        rows = [box_region(variance[:1], region[number]) for number in numbers]
        return torch.cat(rows)
    return box_region(variance, region)


def _read(name: str) -> Any:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"repair.region must be {KINDS}, got {name!r}, which is no file")
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"repair.region={name} cannot be read: {reason}") from None


def _number(name: Any) -> int:
    """An image's number; JSON has names only."""
    given = int(name) if isinstance(name, str) and name.isdecimal() else name
    return at_least("repair.region's image numbers", given, 0)


def _box(name: str, given: Any) -> Box:
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 4:
        raise UserError(f"{name} must be {KINDS}, got {given!r}")
    sides = zip(("top", "left", "height", "width"), given, (0, 0, 1, 1), strict=True)
    for side, value, least in sides:
        at_least(f"{name}'s {side}", value, least)
    return tuple(given)

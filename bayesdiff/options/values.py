"""Options as plain values, by their full names, and those that the shipped files have."""

from collections.abc import Mapping
from typing import Any

from bayesdiff.options.config_folders import shipped_configs


def plain(cfg: Any) -> Any:
    """A configuration node as plain values, interpolations resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def leaves(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted name, interpolations resolved; a list is one value."""
    node = plain(cfg)
    if not isinstance(node, Mapping) or not node:
        return {prefix: node} if prefix else {}
    return {
        name: value
        for key, each in node.items()
        for name, value in leaves(each, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def leaves_at(cfg: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Values at a dotted place of plain options and below it; None where there is nothing."""
    value: Any = cfg
    for part in place.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return leaves(value, place)


def shipped_options() -> dict[str, list[str]]:
    """Choices that have an option, as ``solver=ddim``, by its full name, as ``solver.eta``.

    Those of ``train.yaml`` and ``sweep.yaml`` themselves are of no choice.
    """
    from omegaconf import OmegaConf

    found: dict[str, list[str]] = {}
    folder = shipped_configs()
    for path in sorted(folder.rglob("*.yaml")):
        parts = path.relative_to(folder).parent.parts
        group = ".".join(parts)
        whole = not group or path.read_text(encoding="utf-8").startswith("# @package _global_")
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        for leaf in leaves(content, "" if whole else group):
            words = leaf.split(".")
            if not {"defaults", "_target_", "_partial_"}.isdisjoint(words):
                continue
            for end in range(1, len(words) + 1):
                choices = found.setdefault(".".join(words[:end]), [])
                choice = f"{'/'.join(parts)}={path.stem}"
                if parts and choice not in choices:
                    choices.append(choice)
    return found

"""Pages of the Python interface: one for each package, from the docstrings of what is public."""

import importlib
import inspect
from pathlib import Path

from _ext.public_names import importable

# In the order in which one meets them; whatever is not named here comes after.
PACKAGES = {
    "pipeline": "One run from beginning to end",
    "data": "Sources of data, and the spaces that they lie in",
    "paths": "How data and noise are mixed over time",
    "networks": "Networks, and wrappers for networks of your own",
    "likelihoods": "What the network's output says about the data",
    "models": "What is trained",
    "laplace": "The posterior of the last layer",
    "solvers": "Samplers, forth and back in time",
    "uncertainty": "Estimators of the map",
    "metrics": "Scores of images",
    "pretrained": "Maps for networks that are trained already",
    "report": "Figures, tables, loggers",
    "studies": "Studies that a run can be asked for",
    "sweeps": "Many runs",
    "storage": "Files that are whole or not there",
    "machine": "Devices and processes",
    "checks": "Errors that a user can mend",
}
INDEX = """# Python interface

What may be imported, by package. The names on these pages are those that configurations and
examples use; everything else is free to change.

"""


def pages(root: Path) -> dict[str, str]:
    """Texts of all pages by their names."""
    by_package: dict[str, dict[str, list[str]]] = {}
    for name, thing in _preferred().items():
        modules = by_package.setdefault(name.split(".")[1], {})
        modules.setdefault(thing.__module__, []).append(name)
    order = [p for p in PACKAGES if p in by_package]
    order += sorted(by_package.keys() - PACKAGES.keys())
    made = {f"{name}.rst": _page(name, by_package[name]) for name in order}
    rows = "".join(f"| [`bayesdiff.{p}`]({p}.rst) | {PACKAGES.get(p, '')} |\n" for p in order)
    contents = "\n".join(order)
    made["index.md"] = (
        f"{INDEX}| Package | What is in it |\n| --- | --- |\n{rows}\n"
        f"```{{toctree}}\n:hidden:\n\n{contents}\n```\n"
    )
    return made


def _preferred() -> dict[str, object]:
    """Each public thing once, by the shortest name it can be imported by."""
    names: dict[int, str] = {}
    things = importable()
    for name in sorted(things, key=lambda name: (name.count("."), name)):
        names.setdefault(id(things[name]), name)
    return {name: things[name] for name in sorted(names.values())}


def _page(package: str, modules: dict[str, list[str]]) -> str:
    title = f"bayesdiff.{package}"
    lines = [title, "=" * len(title), "", PACKAGES.get(package, "") + ".", ""]
    lines += [".. list-table::", "   :widths: auto", ""]
    for names in modules.values():
        for name in names:
            lines += [f"   * - :py:obj:`~{name}`", f"     - {_summary(name)}"]
    lines.append("")
    for module, names in sorted(modules.items()):
        if module != title:
            lines += [module.removeprefix("bayesdiff."), "-" * len(module), ""]
        lines += [f".. automodule:: {module}", "   :noindex:", ""]
        for name in names:
            lines += _entry(name)
    return "\n".join(lines)


def _thing(name: str) -> object:
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def _summary(name: str) -> str:
    return " ".join((inspect.getdoc(_thing(name)) or "").partition("\n\n")[0].split())


def _entry(name: str) -> list[str]:
    if inspect.isclass(_thing(name)):
        return [f".. autoclass:: {name}", "   :members:", "   :show-inheritance:", ""]
    return [f".. autofunction:: {name}", ""]

"""Every key of configs/ with its default and its meaning.

A meaning is the comment beside the key in its YAML file. Where that file has none it is the
comment of the same key in another file, first of the key's own group; else what the docstring of
the ``_target_`` says of the argument. Where there is nothing either, a test fails.
"""

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import yaml

# Keys by which Hydra itself is told what to do.
HYDRAS = {"defaults", "_partial_", "_convert_", "_recursive_"}


@dataclass(frozen=True)
class Key:
    """A key of one file.

    Attributes:
        name: in full, as on the command line.
        default: as the file has it; empty for one that has keys of its own.
        meaning: the comment; empty where there is none.
        target: full name of what takes it as an argument; empty where that is not known.
    """

    name: str
    default: str
    meaning: str
    target: str = ""

    @property
    def last(self) -> str:
        """The last word of the name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class File:
    """A file of configs/.

    Attributes:
        group: of its choice; empty for train.yaml and sweep.yaml.
        name: of the choice.
        about: its first comment.
        bases: names that its own defaults list begins with, of any group.
        keys: all of them, in order.
    """

    group: str
    name: str
    about: str
    bases: list[str] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)


def files(root: Path) -> list[File]:
    """All files of configs/, this machine's own aside."""
    configs = root / "configs"
    paths = sorted(configs.rglob("*.yaml"))
    return [_file(p, configs) for p in paths if p.relative_to(configs).parts[0] != "local"]


def _file(path: Path, configs: Path) -> File:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    group = path.relative_to(configs).parent.as_posix().strip(".")
    package = group.replace("/", ".")
    if given := re.match(r"# @package (\S+)", text):
        package = "" if given[1] == "_global_" else given[1]
    about = []
    for line in lines[1 if given else 0 :]:
        if not line.startswith("#"):
            break
        about.append(line.lstrip("# "))
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    keys: list[Key] = []
    if node is not None:
        start = len(about) + bool(given)
        keys = list(_keys(node, package, lines, start))
    return File(group, path.stem, "\n".join(about), _bases(node, lines), keys)


def _bases(node: yaml.Node | None, lines: list[str]) -> list[str]:
    values = {} if node is None else {k.value: v for k, v in node.value}
    found = []
    for item in values["defaults"].value if "defaults" in values else []:
        if isinstance(item, yaml.ScalarNode):
            found.append(item.value)
        else:
            found += [f"{key.value}={value.value}" for key, value in item.value]
    return [name for name in found if name != "_self_"]


def _keys(
    node: yaml.Node, prefix: str, lines: list[str], header: int, target: str = ""
) -> Iterator[Key]:
    """Keys below a node, depth first.

    Yields:
        One for each value, and one for each block of them that has a comment of its own.
    """
    target = next((v.value for k, v in node.value if k.value == "_target_"), "")
    for key, value in node.value:
        name = f"{prefix}.{key.value}" if prefix else key.value
        if key.value in HYDRAS:
            continue
        inner = isinstance(value, yaml.MappingNode) and not value.flow_style and value.value
        # What begins on the lines below has its comment beside the key.
        below = getattr(value, "style", None) in ("|", ">") or (
            isinstance(value, yaml.SequenceNode) and not value.flow_style
        )
        mark = (key if inner or below else value).end_mark
        line, column = mark.line, mark.column
        comment = _joined(_above(lines, key.start_mark, header), _comment(lines, line, column))
        if not inner:
            yield Key(name, _source(value), comment, target)
            continue
        if comment:
            yield Key(name, "", comment, target)
        yield from _keys(value, name, lines, header)


def _comment(lines: list[str], line: int, column: int) -> str:
    """What follows after a column, and goes on below in lines that begin with no capital."""
    found = re.match(r"[^#'\"]*?\s#\s+(.*)", lines[line][column:])
    words = [found[1]] if found else []
    for more in lines[line + 1 :]:
        if not found or not re.match(r"\s*# [^A-Z\s]", more):
            break
        words.append(more.strip(" #"))
    return " ".join(words)


def _above(lines: list[str], mark: yaml.Mark, header: int) -> str:
    """The comment in lines of its own right above a key, which begins with a capital."""
    words: list[str] = []
    for number in range(mark.line - 1, header - 1, -1):
        if not re.match(rf" {{{mark.column}}}# ", lines[number]):
            break
        words.insert(0, lines[number].strip(" #"))
    return " ".join(words) if words and words[0][0].isupper() else ""


def _joined(above: str, beside: str) -> str:
    if above and beside:
        above += " " if above.endswith(":") else "; "
    return above + beside


def _source(node: yaml.Node) -> str:
    """A value in one line, as one would type it."""
    if isinstance(node, yaml.ScalarNode):
        if node.style in ("|", ">"):
            return f"{node.value.partition(chr(10))[0]} ..."
        return node.value if node.value or node.style is None else "''"
    text = node.start_mark.buffer[node.start_mark.index : node.end_mark.index]
    if node.flow_style:
        return " ".join(text.rstrip("\0").split())
    return yaml.safe_dump(_plain(node), default_flow_style=True, width=1000).strip()


def _plain(node: yaml.Node) -> object:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return {key.value: _plain(value) for key, value in node.value}


def explained(all_files: list[File]) -> list[File]:
    """The same files, their keys with meanings from elsewhere where they have none."""
    return [
        replace(each, keys=[replace(k, meaning=_meaning(k, each, all_files)) for k in each.keys])
        for each in all_files
    ]


def _meaning(key: Key, here: File, all_files: list[File]) -> str:
    """The comment, else that of the same key elsewhere, else the argument's own words."""
    if key.meaning:
        return key.meaning
    last = key.last
    if last == "_target_":
        return _summary(key.default)
    if followed := re.fullmatch(r"\$\{([\w.]+)\}", key.default):
        return f"follows {followed[1]}"
    home = key.name.partition(".")[0]
    for near in (
        lambda other, same: other.group == home and same.name == key.name,
        lambda other, same: other.group == here.group and same.name == key.name,
        lambda other, same: same.name == key.name,
        lambda other, same: key.target and same.target == key.target and same.last == last,
    ):
        there = [k.meaning for f in all_files for k in f.keys if k.meaning and near(f, k)]
        if there:
            return Counter(there).most_common(1)[0][0]
    targets = [key.target] + [k.target for f in all_files for k in f.keys if k.name == key.name]
    return next((w for each in targets if each and (w := _arguments(each).get(last))), "")


@cache
def _documentation(target: str) -> str:
    module, _, name = target.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except ImportError:  # of an extra that is not installed
        return ""
    classes = made.__mro__ if isinstance(made, type) else [made]
    texts = [inspect.getdoc(made) or ""]
    texts += [inspect.cleandoc(each.__doc__) for each in classes[1:] if each.__doc__]
    texts += [inspect.getdoc(made.__init__) or ""] if isinstance(made, type) else []
    return "\n\n".join(texts).replace("``", "`")


def _summary(target: str) -> str:
    return " ".join(_documentation(target).strip().partition("\n\n")[0].split())


@cache
def _arguments(target: str) -> dict[str, str]:
    """What a docstring in Google's style says of each argument, in one line."""
    found = {}
    text = _documentation(target)
    for block in re.findall(r"^Args:\n((?:[ \t]+\S.*\n?|\n)+)", text, re.MULTILINE):
        indent = len(block) - len(block.lstrip(" "))
        for item in re.split(rf"\n(?= {{{indent}}}\S)", block.rstrip()):
            name, _, words = item.strip().partition(":")
            for each in re.sub(r"\(.*\)", "", name).split(","):
                found.setdefault(each.strip(), " ".join(words.split()))
    return found

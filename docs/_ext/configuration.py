"""Pages of the configuration's reference: one for train.yaml, sweep.yaml and each group."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from _ext.keys import File, Key, explained, files

# Groups that train.yaml does not list, since another choice makes theirs.
OTHERS = {
    "condition": "what a network is given beside state and time; each model chooses its own",
    "data_type": "what the data of a Bayesian flow network are, for model=bfn",
    "hparams_search": "a search in place of a sweep's grid, for sweep.py",
    "hydra": "what Hydra itself is set to; there is no need to choose",
    "hydra/sweeper": "what proposes the runs of a search; hparams_search chooses it",
    "net": "the network; each data set chooses one that suits it",
    "path": "how data and noise are mixed over time; each model chooses its own",
    "shift": "other data for experiment=beliefs",
    "solver": "how samples are drawn; each model chooses one that suits it",
}
INDEX = """# Configuration

Every option of a run is a key of a YAML file in `configs/`, and every key can be set on the
command line. There are two kinds of words there:

- `solver=ddim` **chooses a file** of a group: `configs/solver/ddim.yaml`.
- `solver.num_steps=50` **sets a key** in what was chosen. A key that begins with `solver.` lives
  in `configs/solver/*.yaml`, and one without a dot, such as `seed`, in
  [`configs/train.yaml`](train.md). Some choices also set keys of other groups; their pages say so.

`python train.py --cfg job` prints all keys of a run, with what you have chosen so far. An unknown
key is refused before anything runs.

## Groups

"""
_SPECIAL = re.compile(r"([\\`*_\[\]<>|$])")
# A command to the end of its line, an option with its value, a key.
_COMMAND = r"python (?:train|sweep)\.py (?:[^\n]*\\\n)*[^\n]*"
_OPTION = re.compile(
    _COMMAND + r"|`[^`\n]+`|(?<![\w.`])(?:[\w./@]+=[\w.\[\],+/-]*[\w\]]|\w+(?:\.\w+)+)(?![\w(])"
)


def groups(root: Path) -> dict[str, str]:
    """All groups, those of train.yaml first, and in a line what each is for."""
    found = {}
    for name in ("train", "sweep"):
        text = (root / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        for group, words in re.findall(r"^  - (\w[\w/]*): \S+ # (.*)$", text, re.MULTILINE):
            found[group] = words
    return found | OTHERS


def pages(root: Path) -> dict[str, str]:
    """Texts of all pages by their names."""
    all_files = _placed(explained(files(root)))
    known = {key.name for each in all_files for key in each.keys}
    words = {g: w for g, w in groups(root).items() if any(f.group == g for f in all_files)}
    made = {}
    for group, meaning in words.items():
        own = [each for each in all_files if each.group == group]
        made[f"{_page(group)}.md"] = _of_group(group, meaning, own, all_files, known)
    for name in ("train", "sweep"):
        own = next(each for each in all_files if each.group == "" and each.name == name)
        made[f"{name}.md"] = _of_root(own, words, known)
    rows = [[f"[`{g}`]({_page(g)}.md)", _text(words[g], known)] for g in words]
    contents = "\n".join(["train", "sweep", *map(_page, words)])
    made["index.md"] = (
        f"{INDEX}{_table(['Group', 'What it chooses'], rows)}\n"
        f"```{{toctree}}\n:hidden:\n\n{contents}\n```\n"
    )
    return made


def _page(group: str) -> str:
    return group.replace("/", "-")


def _placed(all_files: list[File]) -> list[File]:
    """The same, with the keys of groups that go elsewhere, as ``shift@beliefs.shift``, there."""
    places = dict(
        re.match(r"/?(\w+)@([\w.]+)=", base).groups()
        for each in all_files
        for base in each.bases
        if "@" in base and not base.startswith("override")
    )
    return [
        replace(
            each,
            keys=[
                replace(key, name=places[each.group] + key.name.removeprefix(each.group))
                for key in each.keys
            ],
        )
        if each.group in places
        else each
        for each in all_files
    ]


def _of_root(own: File, words: dict[str, str], known: set[str]) -> str:
    text = f"# {own.name}.yaml\n\n{_text(own.about, known)}\n\n"
    chosen = dict(base.split("=") for base in own.bases if "=" in base)
    rows = [
        [f"[`{group}`]({_page(group)}.md)", _code(chosen[group]), _text(words[group], known)]
        for group in words
        if group in chosen
    ]
    text += "## What is chosen\n\n" + _table(["Group", "Default", "Meaning"], rows)
    keys = [key for key in own.keys if key.name not in ("scores",) or key.meaning]
    return text + (f"\n## Keys\n\n{_keys(keys, known)}" if keys else "")


def _of_group(
    group: str, meaning: str, own: list[File], all_files: list[File], known: set[str]
) -> str:
    place = next(
        (b.partition("=")[0] for f in all_files for b in f.bases if f"{group}@" in b), group
    ).lstrip("/")
    text = f"# {group}\n\n{_text(meaning[0].upper() + meaning[1:], known)}. "
    text += f"The files are `configs/{group}/*.yaml`; choose one with `{place}=NAME`.\n\n"
    rows = [
        [f"[`{each.name}`](#{_anchor(place, each)})", _text(each.about, known)] for each in own
    ]
    text += _table(["Name", "What it is"], rows)
    shared = _shared(own)
    if shared:
        text += f"\n## Keys of all of them\n\n{_keys(shared, known)}"
    for each in own:
        text += (
            f"\n({_anchor(place, each)})=\n## {place}={each.name}\n\n{_text(each.about, known)}\n"
        )
        if bases := [b for b in each.bases if not b.startswith("override ")]:
            listed = ", ".join(_code(base.lstrip("/")) for base in bases)
            text += f"\nBegins with {listed}, and sets:\n"
        left = [key for key in each.keys if key not in shared]
        text += f"\n{_keys(left, known)}" if left else ""
    return text


def _anchor(place: str, own: File) -> str:
    return f"{re.sub(r'[^a-z]', '-', place)}-{own.name}".replace("_", "-")


def _shared(own: list[File]) -> list[Key]:
    """Keys that all files of a group have, with the same default and meaning."""
    if len(own) < 3:
        return []
    by_name = {each.name: each for each in own}

    def whole(each: File) -> dict[str, Key]:
        below = [whole(by_name[base]) for base in each.bases if base in by_name]
        return {k: v for keys in below for k, v in keys.items()} | {k.name: k for k in each.keys}

    wholes = [whole(each) for each in own]
    return [
        key
        for name, key in wholes[0].items()
        if all(
            name in other
            and (other[name].default, other[name].meaning) == (key.default, key.meaning)
            for other in wholes[1:]
        )
    ]


def _keys(keys: Iterable[Key], known: set[str]) -> str:
    rows = [[_code(k.name), _code(k.default), _text(k.meaning, known)] for k in keys]
    return _table(["Key", "Default", "Meaning"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _code(value: str) -> str:
    return f"`{value.strip('`')}`".replace("|", r"\|") if value else ""


def _text(words: str, known: set[str]) -> str:
    """Words with Markdown's signs as they are, options and keys as code."""
    done, start = [], 0
    for found in _OPTION.finditer(words):
        option = found[0].replace("\\\n", " ")
        if (
            "=" not in option
            and option[0] != "`"
            and option not in known
            and "._target_" not in option
        ):
            continue
        done += [
            _SPECIAL.sub(r"\\\1", words[start : found.start()]),
            _code(" ".join(option.split())),
        ]
        start = found.end()
    whole = "".join([*done, _SPECIAL.sub(r"\\\1", words[start:])])
    return " ".join(whole.split())

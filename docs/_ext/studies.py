"""A gallery of the studies: a page for each README.md below experiments/, a card for each page."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

HEAD = """# Studies

What is claimed here was measured. Each study is a folder of `experiments/` with its commands, its
numbers and what fell short. A card has the question and a short answer, and leads to the whole.

::::{grid} 1 2 2 2
:gutter: 3
:class-container: studies
"""
# Of what a card shows, in this order: the answer in one sentence, or the first of a longer one.
ANSWERS = ("In one sentence", "Answer", "Conclusion")
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|/)([^)#\s]+)(#[^)\s]*)?\)")


@dataclass(frozen=True)
class Study:
    """What the card of a study shows.

    Attributes:
        name: of its folder.
        title: the heading of its README.md.
        question: its first sentence, or the title where that asks.
        answer: one sentence; empty where the text names none.
        figure: its first one below the folder; empty where there is none.
    """

    name: str
    title: str
    question: str
    answer: str
    figure: str


def read(folder: Path) -> Study:
    """The study of a folder with a README.md."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    title = text.splitlines()[0].lstrip("# ").strip()
    figure = next((place for _, place in _IMAGE.findall(text) if (folder / place).is_file()), "")
    found = [answer for word in ANSWERS if (answer := _sentence(text, word))]
    question = title if title.endswith("?") else _sentence(text, "Question") or title
    question = re.sub(r"(?<=\?) \(.*\)$", "", question)
    return Study(folder.name, title, question, found[0] if found else "", figure)


def _sentence(text: str, word: str) -> str:
    """The first sentence of the paragraph, or of the first item, that begins with a bold word.

    ``**Answer.** The maps ...``, ``**Answer: the maps ...** ...``; one that ends in a list has
    its first item taken.
    """
    start = re.search(rf"^\*\*{word}(?:\.\*\*|: ?)\s*", text, re.MULTILINE)
    if start is None:
        return ""
    rest = text[start.end() :]
    # A bold sentence stays one: its end is that of the asterisks.
    if start.group().rstrip().endswith(":"):
        rest = rest.replace("**", "", 1)
        rest = rest[:1].upper() + rest[1:]
    paragraph = next((p for p in re.split(r"\n\s*\n|\n(?=[-*\d] )", rest) if p.strip()), "")
    words = re.sub(r"^\s*(?:[-*]|\d+\.) ", "", " ".join(paragraph.split()))
    ends = [m for m in re.finditer(r"[.?!](?:\*\*)?(?=\s+[A-Z`*\d]|$)", words)]
    ends = [m for m in ends if not re.search(r"\b(?:e\.g|i\.e|al|vs|Fig|Eq)\.$", words[: m.end()])]
    sentence = words[: ends[0].end()] if ends else words
    return sentence + "**" * (sentence.count("**") % 2)


def folders(root: Path) -> list[Path]:
    """Those of all studies, by name."""
    return sorted(path.parent for path in (root / "experiments").glob("*/README.md"))


def pages(root: Path) -> dict[str, str]:
    """Texts of all pages by their names: the gallery, studies, and tables that these link to."""
    made = {}
    studies = [read(folder) for folder in folders(root)]
    for study in studies:
        made |= _pages_of(root, study)
    cards = "\n".join(_card(study) for study in studies)
    names = "\n".join(study.name for study in studies)
    contents = f"```{{toctree}}\n:hidden:\n\n{names}\n```\n"
    return {"index.md": f"{HEAD}\n{cards}\n::::\n\n{contents}", **made}


def _card(study: Study) -> str:
    lines = [f":::{{grid-item-card}} {study.question}", f":link: {study.name}", ":link-type: doc"]
    if study.figure:
        lines.append(f":img-top: ../../experiments/{study.name}/{study.figure}")
        lines.append(f":img-alt: {study.title}")
    lines += ["", study.answer, ":::"]
    return "\n".join(lines) + "\n"


def _pages_of(root: Path, study: Study) -> dict[str, str]:
    """The README.md of a study, and the tables beside it that it links to."""
    folder = root / "experiments" / study.name
    text = (folder / "README.md").read_text(encoding="utf-8")
    made = {f"{study.name}.md": _moved(text, root, folder, depth=2)}
    for _, place, _ in _LINK.findall(text):
        table = folder / place
        if table.suffix == ".md" and table.name != "README.md" and table.is_file():
            body = table.read_text(encoding="utf-8")
            title = "" if body.startswith("# ") else f"# {study.title}: {table.stem}\n\n"
            whole = _moved(title + body, root, folder, depth=3)
            made[f"{study.name}/{table.stem}.md"] = f"---\norphan: true\n---\n\n{whole}"
    return made


def _moved(text: str, root: Path, folder: Path, depth: int) -> str:
    """A text of a study's folder as it is right in a page so many folders below the root."""
    up = "../" * depth

    def place(target: str) -> str:
        there = os.path.normpath(folder / target)
        return up + Path(there).relative_to(root).as_posix()

    def link(match: re.Match[str]) -> str:
        name, target, anchor = match.group(1), match.group(2), match.group(3) or ""
        if other := re.fullmatch(r"\.\./([\w-]+)(?:/README\.md|/)?", target):
            return f"[{name}](/studies/{other[1]}.md{anchor})"
        if target.endswith(".md") and (folder / target).is_file() and "/" not in target:
            return f"[{name}](/studies/{folder.name}/{target})"
        there = place(target)
        if there.startswith(f"{up}docs/"):
            return f"[{name}](/{there.removeprefix(up + 'docs/')}{anchor})"
        return f"[{name}](path:{there})"

    text = _IMAGE.sub(lambda m: f"![{m[1]}]({place(m[2])})", text)
    text = _LINK.sub(link, text)
    # The name of another study in running text.
    return re.sub(r"(?<!\[)`\.\./([\w-]+)/?`(?!\])", _other(root), text)


def _other(root: Path):
    def named(match: re.Match[str]) -> str:
        known = (root / "experiments" / match[1] / "README.md").is_file()
        return f"[`{match[1]}`](/studies/{match[1]}.md)" if known else match[0]

    return named

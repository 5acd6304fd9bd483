"""The documentation: references that miss nothing, links that lead somewhere, pages that build."""

import doctest
import fnmatch
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from _ext import configuration, interface, studies
from _ext.generated import MADE
from _ext.keys import File, Key, explained, files
from _ext.public_names import importable
from _ext.repository_links import on_the_site, with_pages
from conftest import CONFIGS, ROOT
from test_readme import MADE as NOT_WRITTEN
from test_readme import PAGES

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def shipped() -> list[File]:
    return files(ROOT)


@pytest.fixture(scope="module")
def configuration_pages() -> dict[str, str]:
    return configuration.pages(ROOT)


@pytest.fixture(scope="module")
def study_pages() -> dict[str, str]:
    return studies.pages(ROOT)


def test_every_key_has_a_meaning(shipped):
    """Add a comment beside the key in the YAML file that is named here."""
    bare = [
        f"{each.group}/{each.name}.yaml: {key.name}"
        for each in explained(shipped)
        for key in each.keys
        if not key.meaning
    ]
    assert bare == []
    assert sum(len(each.keys) for each in shipped) > 1000


def test_a_key_without_a_meaning_is_seen():
    lone = Key("solver.unheard_of", "1", "", "bayesdiff.solvers.Euler")
    taken = Key("net.fold", "null", "", "bayesdiff.networks.Adapter")
    (made,) = explained([File("solver", "mine", "", keys=[lone, taken])])
    assert made.keys[0].meaning == "" and made.keys[1].meaning


def by_name(shipped, group, name):
    (found,) = [each for each in shipped if (each.group, each.name) == (group, name)]
    return {key.name: key for key in found.keys}


@pytest.mark.parametrize(
    ("group", "name", "key", "default", "begins", "ends"),
    [
        ("", "train", "report.members", "5", "posterior trajectories", "of members"),
        ("", "train", "report", "", "what figures show", "depends on it"),
        ("solver", "ddim", "solver.eta", "0.0", "0: deterministic", "DDPM"),
        # A comment that goes on below, one above, and one in both places.
        ("laplace", "full", "laplace.n_eff", "null", "images the", "with fresh noise"),
        ("experiment", "filtering", "filtering.segmentation", "null", "Callable of", "itself"),
        ("experiment", "inference", "inference.means", "[[0.0, 0.0], [", "Gaussians", "0"),
        # Of a text of several lines.
        ("hydra", "default", "hydra.help.footer", "Your own configs", "last of --help", "is seen"),
        ("condition", "embedding", "model.condition.empty", "null", "vector", "zeros"),
    ],
)
def test_a_comment_belongs_to_its_key(shipped, group, name, key, default, begins, ends):
    found = by_name(shipped, group, name)[key]
    assert found.default.startswith(default) and bool(found.default) == bool(default)
    assert found.meaning.startswith(begins) and found.meaning.endswith(ends), found.meaning


def test_a_meaning_comes_from_the_nearest_place(shipped):
    whole = explained(shipped)
    assert by_name(whole, "experiment", "demo")["metrics.num_images"].meaning == "0: no scores"
    assert by_name(whole, "data", "digits")["data.source.name"].meaning == "follows data.name"
    assert by_name(whole, "debug", "overfit")["trainer.max_epochs"].meaning.startswith("Stop")


def test_every_key_has_a_row(shipped, configuration_pages):
    assert len(shipped) == len([p for p in CONFIGS.rglob("*.yaml") if "local" not in p.parts])
    for each in shipped:
        page = configuration_pages[f"{(each.group or each.name).replace('/', '-')}.md"]
        for key in each.keys:
            place = "beliefs.shift" if each.group == "shift" else ""
            name = f"{place}{key.name.removeprefix('shift')}" if place else key.name
            assert f"| `{name}` |" in page, (each.name, key.name)
        assert not each.group or f"[`{each.name}`](#" in page


def test_every_group_says_what_it_is_for(shipped):
    assert {each.group for each in shipped if each.group} <= configuration.groups(ROOT).keys()


def test_every_public_name_is_in_the_reference():
    pages = interface.pages(ROOT)
    entries = re.findall(r"^\.\. auto(?:class|function):: (\S+)$", "\n".join(pages.values()), re.M)
    things = importable()
    assert {id(things[name]) for name in entries} == {id(thing) for thing in things.values()}
    assert len(entries) == len(set(entries)) > 100
    assert "bayesdiff.solvers.Euler" in entries  # as one imports it


def test_every_study_has_a_card_and_a_page(study_pages):
    names = [path.parent.name for path in (ROOT / "experiments").glob("*/README.md")]
    index = study_pages["index.md"]
    assert names and len(re.findall(r"^:link: ", index, re.M)) == len(names)
    for name in names:
        assert f":link: {name}\n" in index and f"{name}.md" in study_pages
        study = studies.read(ROOT / "experiments" / name)
        drawn = list((ROOT / "experiments" / name).rglob("*.png"))
        assert bool(study.figure) == bool(drawn), name


def test_pictures_and_files_of_the_studies_are_there(study_pages):
    for name, text in study_pages.items():
        here = DOCS / "studies" / Path(name).parent
        places = re.findall(r"!\[[^]]*\]\(([^)]+)\)|\(path:([^)]+)\)|:img-top: (\S+)", text)
        for place in filter(None, sum(places, ())):
            assert (here / place).resolve().is_file(), (name, place)
        for place in re.findall(r"\]\(/studies/([^)#]+)", text):
            assert place in study_pages, (name, place)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("**Answer.** It holds. More.", "It holds."),
        ("**Answer: it is exact.** More.", "It is exact."),
        ("**Answer.**\n\n- One, of 2.5 e.g. thus.\n- Two.", "One, of 2.5 e.g. thus."),
        ("**Answer.** Long.\n\n**In one sentence.** Short\nwords.", "Short words."),
        ("**Answer.** **Bold.** More", "**Bold.**"),
        ("**Conclusion.** `a` is b", "`a` is b"),
        ("Nothing.", ""),
    ],
)
def test_a_card_has_one_sentence(tmp_path, text, sentence):
    (tmp_path / "README.md").write_text(f"# Title\n\n**Question.** Why? So.\n\n{text}\n")
    study = studies.read(tmp_path)
    assert (study.question, study.answer) == ("Why?", sentence)


@pytest.mark.parametrize(
    ("written", "made"),
    [
        ("[a](../../experiments/budget/README.md)", "[a](/studies/budget.md)"),
        ("[a](../experiments/budget/)", "[a](/studies/budget.md)"),
        ("[a](../experiments/budget/run.py)", "[a](../experiments/budget/run.py)"),
        ("[a](../tutorials/01_first_map.py)", "[a](/gallery/01_first_map.rst)"),
        ("[a](../../README.md#more)", "[a](/index.md)"),
        ("in `experiments/budget`.", "in [`experiments/budget`](/studies/budget.md)."),
        ("```sh\n`experiments/budget`\n```\n", "```sh\n`experiments/budget`\n```\n"),
    ],
)
def test_links_of_the_repository_lead_to_pages(written, made):
    assert on_the_site(written) == made


def test_contents_leave_out_pages_that_are_not_there():
    text = "a/first*\na/second*\na/*\nb/*\n"
    assert with_pages(text, ["a/first", "a/third", "c"]) == "a/first*\na/*\n"
    assert with_pages(text, ["a/first"]) == "a/first*\n"
    cards = [f":::{{grid-item-card}} A\n:link: {name}\n\nWords.\n:::\n\n" for name in "xy"]
    assert with_pages("".join(cards), ["y"]) == cards[1]


def test_the_contents_name_every_page():
    contents = (DOCS / "index.md").read_text(encoding="utf-8")
    contents += (
        (DOCS / "extend" / "index.md").read_text("utf-8") if (DOCS / "extend").is_dir() else ""
    )
    patterns = re.findall(r"^([\w/-]+\*?)$", contents, re.MULTILINE)
    patterns += [f"extend/{pattern}" for pattern in patterns]
    for page in PAGES:
        name = page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")
        assert name in ("README", "index") or any(fnmatch.fnmatch(name, p) for p in patterns), name


def test_what_a_build_writes_is_ignored_and_removed():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    (clean,) = re.findall(
        r"^clean:.*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text() + "\n", re.M
    )
    assert set(MADE) <= set(NOT_WRITTEN)
    for name in NOT_WRITTEN:
        assert f"docs/{name}/" in ignored and f"docs/{name}" in clean.split(), name


class Links(HTMLParser):
    """Addresses that a page links to, and the places in it that may be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places.update(filter(None, (given.get("id"), given.get("name"))))
        self.links += [given[key] for key in ("href", "src") if given.get(key)]


@pytest.mark.slow
def test_the_site_builds_and_its_links_lead_somewhere(tmp_path):
    """Without the tutorials being run: make docs does that."""
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-D", "plot_gallery=0"]
    command += ["-b", "html", "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "html")]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-4000:]
    pages = {path: Links(path) for path in (tmp_path / "html").rglob("*.html")}
    assert len(pages) > 80
    for page, found in pages.items():
        for link in found.links:
            if re.match(r"\w+:|//", link):
                continue
            place, _, anchor = unquote(link).partition("#")
            there = (page.parent / place.partition("?")[0]).resolve() if place else page
            assert there.exists(), (page.name, link)
            if anchor and there in pages:
                assert anchor in pages[there].places, (page.name, link)


def wrong_prompts(text: str) -> int:
    """How many of the lines after ``>>>`` do not answer as the page has it."""
    blocks = re.findall(r"^```\w*\n(>>> .*?)^```", text, re.MULTILINE | re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "page", "", 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    return runner.run(test, out=lambda line: None).failed


@pytest.mark.slow
def test_prompts_on_the_pages_answer_as_they_say():
    assert {page.name: found for page in PAGES if (found := wrong_prompts(page.read_text()))} == {}
    assert wrong_prompts("```python\n>>> 1 + 1\n3\n```\n") == 1

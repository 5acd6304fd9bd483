"""Every command of the README and of docs/ works, at smoke size and without a network."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, compose_list, smallest
from test_sources import pixels, write_mnist, write_png, write_zip

from bayesdiff import pipeline
from bayesdiff.checks import UserError

DOCS = ROOT / "docs"
# Folders of docs/ that a build writes.
MADE = ("_build", "gallery", "studies", "reference/api", "reference/configuration")


def written(page):
    """Whether a page of docs/ is one that somebody wrote."""
    return not page.relative_to(DOCS).as_posix().startswith(tuple(f"{name}/" for name in MADE))


PAGES = [ROOT / "README.md", *filter(written, sorted(DOCS.rglob("*.md")))]
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
LINES = [line.split("#")[0].strip() for line in "\n".join(BLOCKS).splitlines()]
COMMANDS = [line for line in LINES if line]


def arguments(script):
    return [line.split()[2:] for line in COMMANDS if line.startswith(f"python {script}")]


def test_the_readme_has_commands_of_every_kind():
    kinds = {"make", "python", "tensorboard"}
    assert {shlex.split(line)[0] for line in COMMANDS} == kinds
    assert len(arguments("train.py")) >= 10 and len(arguments("sweep.py")) >= 3


def test_every_link_leads_to_a_file():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        for link in links:
            place = (page.parent / link).resolve()
            # A build of the documentation, which knows its own pages, checks these.
            made = place.is_relative_to(DOCS) and not written(place)
            assert link.startswith("http") or made or place.exists(), (page.name, link)
    named = set(re.findall(r"`(experiments/[\w-]+)`", TEXT))
    assert named and all((ROOT / place).is_dir() for place in named)


def test_every_make_command_is_a_target():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in COMMANDS:
        if line.startswith("make"):
            assert line.split()[1] in targets, line


# test_ddp and test_sharding run several processes for real.
ELSEWHERE = ("--cfg", "job", "trainer=ddp", "trainer=fsdp", "trainer.devices=2")
# Words for Hydra's launchers and sweepers, and for the planner.
ENGINE = ("hydra", "hparams_search", "dry_run")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name in ("MNIST", "FashionMNIST"):
        write_mnist(root / name / "raw", train=160, test=40)
    for number in range(180):
        write_png(root / "images" / "ab"[number % 2] / f"{number}.png", pixels(number, (8, 8)))
    images = {f"{n}.png": pixels(n, (8, 8)) for n in range(180)}
    write_zip(root / "images.zip", images, {"labels": [[name, 0] for name in images]})
    return root


@cache
def starts_cells(engine):
    """Whether Hydra has a sweeper and a launcher under these words."""
    composed = compose_list(list(engine), "sweep", return_hydra_config=True)
    return bool(composed.hydra.sweeper and composed.hydra.launcher)


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    """One folder for all commands, so that the same training is made once."""
    return tmp_path_factory.mktemp("outputs")


def runnable(given, data_root):
    """The command's own arguments, with data where the README says path/to."""
    values = [value.replace("path/to/images", str(data_root / "images")) for value in given]
    lists = [value for value in values if value != "-m" and "[" in value]
    swept = [value.replace("=10,", "=1,") for value in values if value != "-m"]
    return [value if value in lists else value.split(",")[0] for value in swept]


TOYS = ("circles", "moons", "s_curve", "sine2", "swirl")


@pytest.mark.parametrize("given", arguments("train.py") + arguments("sweep.py"), ids=" ".join)
def test_command_runs(given, data_root, trained, output_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESDIFF_DATA", str(data_root))
    monkeypatch.setattr("bayesdiff.metrics.classifier._epochs", lambda size: 1)
    given = [value for value in given if value not in ELSEWHERE]
    engine = [word for word in given if word.startswith(ENGINE)]
    assert starts_cells(tuple(engine))  # test_launchers runs them
    overrides = runnable([word for word in given if word not in engine], data_root)
    # Thumbnails of thumbnails: the size changes nothing but the time.
    overrides = [o.replace("data.resize=32", "data.resize=16") for o in overrides]
    overrides = [o.replace("path/to/last.ckpt", str(trained.checkpoint)) for o in overrides]
    if "data=zip" in overrides:
        overrides.append("metrics.num_images=0")  # one class only: nothing to classify
    if "uncertainty.validate=true" in overrides:
        overrides += ["uncertainty.validate_images=4", "uncertainty.validate_members=2"]
    if "experiment=filtering" in overrides:
        overrides += ["filtering.num_images=40", "filtering.seeds=[0]", "filtering.keep=[0.8]"]
        overrides += ["filtering.members=2", "filtering.aleatoric_draws=0", "filtering.draws=2"]
        overrides.append("filtering.subsets=2")
    if any(o.startswith("filtering.guarantee") for o in overrides):
        overrides += ["filtering.seeds=[0,1]", "filtering.num_images=60"]
    if {"experiment=rectify", "experiment=diversity"} & set(overrides):
        overrides += ["repair.num_images=4", "repair.draws=2", "repair.bootstrap=10"]
    if "experiment=interpolation" in overrides:
        overrides += ["interpolation.pairs=2", "interpolation.points=3"]
    if "experiment=head_chain" in overrides:
        overrides += ["head_chain.num_images=20", "head_chain.chains=4", "head_chain.draws=12"]
        overrides.append("head_chain.warmup=2")
    if "experiment=code_length" in overrides:
        overrides += ["code_length.num_images=10", "code_length.draws=2"]
    if "experiment=beliefs" in overrides:
        overrides += ["beliefs.num_images=4", "beliefs.num_samples=2", "beliefs.bootstrap=10"]
    if {f"data={name}" for name in TOYS} & set(overrides):
        overrides += ["net=mlp", "data.source.points=512", "data.source.test_points=64"]
    if "experiment=inversion" in overrides:
        overrides += ["inversion.num_images=8", "inversion.members=2", "inversion.bootstrap=10"]
        overrides.append("inversion.animation=false")
    if "experiment=coverage" in overrides:
        overrides.append("coverage.points=100")
    if "experiment=residuals" in overrides:
        overrides += ["residuals.points=6", "residuals.references=20"]
    if "experiment=inference" in overrides:
        overrides += ["inference.observations=8", "inference.importance_draws=2"]
        overrides += ["inference.chains=4", "inference.draws=20", "inference.warmup=10"]
        overrides += ["inference.repeats=10", "inference.repeat_observations=4"]
        overrides += ["inference.truths=10", "inference.heads=3"]
    if "data=mnist" in overrides and any(o.startswith("experiment=") for o in overrides):
        overrides.append("data.resize=8")
    if "ckpt_path=last" in overrides:
        cfg = compose_list(smallest(tmp_path, "solver.num_steps=6", *overrides))
        with pytest.raises(UserError, match="ckpt_path=last but there is no"):
            pipeline.run(cfg)
        return
    if "uncertainty.calibrate=held_out" in overrides:
        cfg = compose_list(smallest(output_dir, "solver.num_steps=6", *overrides))
        with pytest.raises(UserError, match="held_out"):  # a training of two steps has no gap
            pipeline.run(cfg)
        return
    result = pipeline.run(compose_list(smallest(output_dir, "solver.num_steps=6", *overrides)))
    assert (result.folder / "metrics.json").is_file()
    assert list((result.folder / "figures").glob("*.png"))


def python_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def small(monkeypatch, folder):
    """Runs of the examples have smoke size, whatever they ask for."""
    tiny = ["solver.num_steps=6", "uncertainty.num_images=4", f"output_dir={folder}"]

    def composed(*words):
        return compose_list(smallest(folder, *words, *tiny))

    monkeypatch.setattr(pipeline, "compose", composed)
    monkeypatch.chdir(folder)


def test_the_first_lines_of_python_leave_an_image_and_its_map(tmp_path, monkeypatch):
    small(monkeypatch, tmp_path)
    example, _ = python_of(ROOT / "README.md")
    assert len(example.strip().splitlines()) <= 12
    names: dict = {}
    exec(example, names)
    assert len(list((names["result"].folder / "png").glob("*.png"))) == 8


def test_the_lines_for_a_pipeline_leave_an_image_and_its_map(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from test_pretrained_command import of_digits

    of_digits(classes=None).save_pretrained(tmp_path / "path/to/pipeline")
    for number in range(40):
        write_png(tmp_path / f"path/to/training/images/{number}.png", pixels(number, (8, 8)))
    monkeypatch.chdir(tmp_path)
    _, example = python_of(ROOT / "README.md")
    assert len(example.strip().splitlines()) <= 12
    exec(example, {})
    assert list((tmp_path / "out" / "png").glob("*-map.png"))


def test_the_guide_in_python_runs(tmp_path, monkeypatch):
    small(monkeypatch, tmp_path)
    names: dict = {}
    for block in python_of(ROOT / "docs" / "guide" / "in-python.md"):
        exec(block, names)
    assert names["variance"].shape == (4, 1, 8, 8) and (names["variance"] > 0).all()


def test_the_readme_is_one_page():
    words = (ROOT / "README.md").read_text().split()
    assert len(words) <= 900, len(words)


def test_tensorboard_reads_what_a_run_wrote(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.cell / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] and events.Tags()["images"]
    assert Path(trained.folder / "tensorboard").is_dir()

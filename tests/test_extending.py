"""What docs/extend/ says works, from a folder outside of the package: its blocks are run."""

import importlib
import json
import logging
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUICK_CLASSIFIER, ROOT, hydra_composes, smallest
from scipy.linalg import sqrtm

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.paths import CondOT
from bayesdiff.runs.setup import Setup, sampled_from, scored
from bayesdiff.runs.training import fit
from bayesdiff.solvers import integrate, plan
from bayesdiff.storage.artefacts import key_of
from bayesdiff.studies.filtering.filtering import Filtering, _rivals
from bayesdiff.studies.own_scores import own_scores, source_of
from bayesdiff.studies.repair.redraw import OF_MAPS
from bayesdiff.studies.scoring import Seen, _of_own
from bayesdiff.studies.study import study_key
from bayesdiff.uncertainty.stored import stored_samples

PAGES = {page: page.read_text("utf-8") for page in sorted((ROOT / "docs" / "extend").glob("*.md"))}
GUIDE = "\n".join(PAGES.values())
# Hydra reads a package from the very first line, so that the file's name comes after it.
BLOCK = r"^```(?:python|yaml)\n((?:# @package _global_\n)?# (mine/\S+)\n.*?)^```"
BLOCKS = re.findall(BLOCK, GUIDE, re.DOTALL | re.MULTILINE)
FILES = {name: text for text, name in BLOCKS}
SCRIPTS = sorted(name for name in FILES if re.search(r"/(?!my_)\w+\.py$", name))
COMMANDS = sorted(set(re.findall(r"^(?:# )?python train\.py (.*)$", GUIDE, re.MULTILINE)))
OPTION = "--config-dir mine/configs "


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """The user's folder, as the guide has it, where Python and Hydra are told to look."""
    place = tmp_path_factory.mktemp("outside")
    for name, text in FILES.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place / "mine")
        patch.setattr(*QUICK_CLASSIFIER)
        yield place


def run(mine, *overrides):
    """train.py as the shell would start it in the folder above, but in this process."""
    root, printed = logging.getLogger(), []
    handlers, level = root.handlers[:], root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(mine)
        patch.setattr(sys, "argv", ["train.py", *OPTION.split(), *overrides])
        patch.setattr(pipeline, "show", printed.append)
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        finally:
            root.handlers[:], root.level = handlers, level
    return printed[0]


def composed(mine, *overrides):
    folder = f"hydra.searchpath=[file://{mine / 'mine' / 'configs'}]"
    return hydra_composes([folder, *overrides])


OWN = (
    *("solver=damped", "solver.num_steps=4", "uncertainty=last_step", "metrics=rows"),
    *("scores=bright", "report.sorted_by=[own.bright]", "experiment=loudest"),
    *("loudest.num_images=4", "metrics.num_images=12", "net.patch=2"),
)


def overrides(mine, *more):
    """The smallest run with these choices; only an ensemble has members."""
    given = smallest(mine / "outputs", *more)
    without = "uncertainty.members", "uncertainty.noise_members", "uncertainty=ensemble"
    return [o for o in given if "uncertainty=ensemble" in more or not o.startswith(without)]


@pytest.fixture(scope="module")
def result(mine):
    return run(mine, *overrides(mine, *OWN))


@pytest.fixture(scope="module")
def at(mine, result):
    """What the run worked with, its network trained."""
    this, solver, estimator, laplace = pipeline.prepare(composed(mine, *overrides(mine, *OWN)))
    weights = fit(this, laplace)
    posterior = laplace.fit(this.model.eval(), this.data.data)
    return Setup(this, solver, estimator, posterior, weights)


def by_hand(at):
    """Images of Damped at the times of late, and what LastStep makes of them; four of each."""
    times = [(k / 4) ** (1 / 1.5) for k in range(5)]
    start, net = at.starts(range(4)), at.run.model.net
    x, t = start.initial(), torch.tensor(times)
    with torch.inference_mode():
        for k in range(4):
            h, last = times[k + 1] - times[k], x
            x = x + h * (net(x, t[k].expand(4), start.condition) - 0.2 * x)
        phi = net.features(last, t[3].expand(4), start.condition)
    of_output = 2 * (1 - times[3]) ** 2 * at.posterior.predictive_variance(phi)
    return x, of_output.repeat_interleave(2, 2).repeat_interleave(2, 3)  # of blocks of 2x2 pixels


def test_a_solver_with_times_and_an_estimator_of_ones_own_make_images_and_maps(result, at):
    samples = stored_samples(result.samples)
    images, variance = by_hand(at)
    torch.testing.assert_close(samples.images, images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(samples.variance, variance.float(), rtol=1e-4, atol=1e-7)
    assert samples.nfe == 4 + 1 and samples.estimator == "last_step"


def test_an_encoder_of_ones_own_is_what_fid_looks_at(result, at):
    (file,) = result.folder.parent.glob("images-damped-*.npz")
    with np.load(file) as arrays:
        made = next(v for v in arrays.values() if v.ndim == 4)
    rows = [x.astype(float).mean((1, 3)) / 255 for x in (made, at.run.data.data.images.numpy())]
    (mean, cov), (mean_2, cov_2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in rows)
    root = sqrtm(cov @ cov_2).real
    expected = ((mean - mean_2) ** 2).sum() + np.trace(cov + cov_2 - 2 * root)
    assert len(made) == 12
    assert result.metrics["fid@12/RowMeans"] == pytest.approx(expected, rel=1e-3)
    assert result.settings["features"] == "RowMeans"


def bright(samples):
    """The guide's score, in words of its own."""
    return torch.where(samples.images > 0.25, samples.variance, 0).sum((1, 2, 3)).double()


def test_a_score_of_ones_own_sorts_the_images(result):
    with np.load(result.folder / "image-scores.npz") as arrays:
        found = torch.from_numpy(arrays["own.bright"])
    torch.testing.assert_close(found, bright(stored_samples(result.samples)))
    assert (result.folder / "figures" / "sorted.png").is_file()


def test_a_study_of_ones_own_has_a_folder_and_a_headline(result):
    sums = stored_samples(result.samples).variance.flatten(1).sum(1)
    record = json.loads((result.studies[0] / "results.json").read_text())
    assert record["sums"] == pytest.approx(sums.tolist())
    assert result.metrics["loudest/max@4"] == pytest.approx(float(sums.max()))


def test_a_repair_chooses_by_a_score_of_ones_own(mine, result):
    rectify = "experiment=rectify repair.ways=[fresh] repair.num_images=4 repair.draws=2"
    more = "repair.bootstrap=10 repair.score=own.bright scores=bright uncertainty=last_step"
    shared = (
        "solver=damped",
        "solver.num_steps=4",
        "net.patch=2",
        *rectify.split(),
        *more.split(),
    )
    found = run(mine, *overrides(mine, *shared))
    (folder,) = found.studies
    record = json.loads((folder / "results.json").read_text())
    assert folder.parent == result.folder.parent  # one training
    assert {"own.bright", "map.sum"} <= {row["score"] for row in record["picks"]}
    with np.load(folder / "draws.npz") as arrays:
        scores = torch.from_numpy(arrays["fresh_scores"])
    own = bright(stored_samples(result.samples))
    torch.testing.assert_close(scores[:, 0, -1], own)
    assert scores.shape == (4, 3, len(OF_MAPS) + 1)


def test_filtering_has_a_score_of_ones_own_for_every_map():
    def spread(members, images):
        return (members - images[:, None]).square().flatten(1).mean(1)

    def flat(variance):
        return variance.flatten(1).sum(1)

    images, variance = 2 * torch.rand(3, 1, 2, 2) - 1, torch.rand(2, 3, 1, 2, 2)
    members = torch.randint(0, 256, (3, 4, 1, 2, 2), dtype=torch.uint8)
    maps = {}
    for name, each in zip(("ensemble", "other"), variance, strict=True):
        maps[name] = SimpleNamespace(images=images, variance=each, labels=None)
        maps[name].in_model_range = lambda made=maps[name]: made
    seen = Seen(members, own=own_scores({"spread": spread, "flat": flat}))
    found = _of_own(None, maps, seen)
    assert set(found) == {"own.spread", "ensemble.flat", "other.flat"}
    expected = (members.double() / 127.5 - 1 - images[:, None]).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(found["own.spread"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["other.flat"], variance[1].sum((1, 2, 3)).double())
    options = Filtering(own_scores={"spread": spread, "looks": lambda images: images})
    assert _rivals(options) == {"own.looks"}  # which sees nothing of the posterior


def keys(at):
    """Of images, of scores of images, of a figure's scores, and of the study."""
    cfg = at.run.cfg
    return {
        "my_solver": key_of(*sampled_from(at.run, "")),
        "my_encoder": key_of(scored(at.run)),
        "my_score": key_of(source_of(cfg, ["map.sum", "own.bright"])),
        "my_study": study_key(at, "loudest", at.run.studies["loudest"]),
        "my_estimator": key_of(at.of_maps),
    }


def test_a_changed_file_is_another_key(mine, at):
    before = keys(at)
    for name in before:
        path = mine / "mine" / f"{name}.py"
        text = path.read_text()
        path.write_text(text + "# changed\n")
        importlib.reload(sys.modules[name])
        assert keys(at)[name] != before[name], name
        path.write_text(text)
        importlib.reload(sys.modules[name])
    assert keys(at) == before


def test_a_multistep_solver_of_ones_own_is_of_second_order(mine, capsys):
    runpy.run_path(str(mine / "mine" / "order.py"))
    assert float(capsys.readouterr().out.split(":")[1]) == pytest.approx(4, rel=0.1)
    path, x = CondOT(), torch.ones(1, dtype=torch.float64)
    solver = importlib.import_module("my_solver").TwoStep(3, grid=lambda path, n: [0, 0.2, 0.6, 1])
    v, y = [], 1.0
    for t, h, w in ((0, 0.2, 0), (0.2, 0.4, 1), (0.6, 0.4, 0.5)):
        v.append(t - y)
        y += h * ((1 + w) * v[-1] - w * (v[-2] if w else 0))
    end = integrate(lambda x, t: t - x, plan(solver, path, "velocity"), x, torch.randn)
    assert float(end) == pytest.approx(y, rel=1e-12)


def test_data_network_path_and_likelihood_of_ones_own_train_a_model(mine):
    choices = "data=stripes net=small path=circle likelihood=rounded model.num_classes=null"
    more = "uncertainty=ensemble", "solver.num_steps=2", "metrics.num_images=0"
    given = overrides(mine, *choices.split(), *more)
    given.remove("net=tiny")
    result = run(mine, *given)
    assert result.settings["data"] == "stripes" and result.settings["model"] == "circle"
    model = pipeline.prepare(composed(mine, *given))[0].model
    assert type(model.net).__name__ == "Small"
    x_1, x_0, t = torch.rand(5, 1, 8, 8), torch.randn(5, 1, 8, 8), torch.rand(5)
    angle = (t * torch.pi / 2).view(-1, 1, 1, 1)
    state, target = model.corrupt(x_1, x_0, t)
    x_1 = x_1.round()  # the nearest of -1, 0, 1
    torch.testing.assert_close(state, angle.sin() * x_1 + angle.cos() * x_0)
    slope = torch.pi / 2 * (angle.cos() * x_1 - angle.sin() * x_0)
    torch.testing.assert_close(target, slope)


def test_film_wavelets_a_callback_and_a_logger_of_ones_own_work_together(mine):
    choices = "net=film space=haar callbacks=norms logger=[tensorboard,lines]"
    more = "uncertainty=ensemble", "metrics.num_images=0", "solver.guidance=2"
    given = overrides(mine, *choices.split(), *more)
    given.remove("net=tiny")
    result = run(mine, *given)
    lines = [json.loads(row) for row in (result.folder.parent / "metrics.jsonl").open()]
    norms = [row["weights/norm"] for row in lines if "weights/norm" in row]
    assert len(norms) == 1 and norms[0] > 1 and any("train/loss" in row for row in lines)
    rows = [json.loads(row) for row in (result.folder / "metrics.jsonl").open()]
    assert rows[0]["nfe"] == result.metrics["nfe"]
    samples = stored_samples(result.samples)
    assert samples.images.shape == samples.variance.shape == (4, 1, 8, 8)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_of_the_guide_runs(name, mine, monkeypatch):
    monkeypatch.chdir(mine)
    runpy.run_path(name)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_guide_finds_its_files(command, mine, monkeypatch):
    given = shlex.split(command)
    if " ".join(given[:2]) + " " == OPTION:
        given = given[2:]
        assert any(name in str(composed(mine, *given)) for name in ("my_", "own."))
    if command == "--cfg job" or any(word.startswith("experiment=") for word in given):
        return
    monkeypatch.chdir(mine)
    if "data.root=" in command:
        runpy.run_path("mine/make_pictures.py")
    where = f"output_dir={mine / 'prepared'}", "trainer.accelerator=cpu"
    pipeline.prepare(composed(mine, *given, *where))


def test_every_block_of_the_guide_is_a_file_and_every_file_is_chosen():
    assert GUIDE.count("\n```python") + GUIDE.count("\n```yaml") == len(BLOCKS) == len(FILES)
    assert all(len(text.splitlines()) <= 300 for text in PAGES.values())
    every = " ".join(COMMANDS)
    for name in FILES:
        if name.endswith(".yaml"):
            group, word = Path(name).parts[-2], Path(name).stem
            assert re.search(rf"\b{group}=\S*\b{word}\b", every), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["report.chosen_by=own.dark"],
            "unknown score report.chosen_by=own.dark;.* scores= ",
        ),
        (["metrics=rows", "metrics.features._target_=torch.nn.Identity"], "must give images"),
        (["metrics.features=[1]"], r"unknown metrics.features \[1\]; choose from classifier"),
    ],
)
def test_what_is_of_no_use_is_refused_before_any_work(given, message, mine):
    with pytest.raises(UserError, match=message) as refusal:
        pipeline.prepare(composed(mine, *smallest(mine / "refused", *given)))
    assert "\n" not in str(refusal.value) and not list(mine.glob("refused/*/checkpoints"))

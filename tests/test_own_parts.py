"""A solver, score or file of one's own that cannot work is refused in one line with its cure."""

from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, hydra_composes, smallest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.cli import explain
from bayesdiff.options import shadows
from bayesdiff.paths import CondOT, VariancePreserving
from bayesdiff.runs.build import source_data
from bayesdiff.solvers import (
    DDIM,
    DDPM,
    RK4,
    DPMSolverPP2M,
    Euler,
    Heun,
    Solver,
    Step,
    plan,
    time_grid,
)
from bayesdiff.solvers.encode import backward
from bayesdiff.studies.own_scores import own_scores, try_scores


@dataclass(frozen=True)
class TwoStep(Solver):
    """Adams-Bashforth of equal steps, with one thing changed."""

    change: object = None
    name = "mine"

    def steps(self, path, prediction, times):
        made = [
            Step((a,), ((1.0,),), (1.0, 1.5 * (b - a)), 0.0, b, ((0.0, 1.0),), (-0.5 * (b - a),))
            for a, b in pairwise(times)
        ]
        made[0] = replace(made[0], output=(1.0, times[1] - times[0]), history=())
        return self.change(made) if self.change else made


class Named(TwoStep):
    name = "x/y"


def every(**changes):
    return lambda steps: [replace(step, **changes) for step in steps]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (every(output=(1.0,)), "step 0 has 1 coefficients in output, and needs 2: of x and"),
        (every(output=(1.0, 0.1, 0.2)), "step 0 has 3 coefficients in output, and needs 2"),
        (every(output=1.0), r"step 0 has output=1.0; give a row, as in \(1.0,\)"),
        (every(output=("a", 1.0)), "step 0 has the coefficient 'a'; give numbers"),
        (every(inputs=((1.0, 0.5),)), r"step 0 has 2 coefficients in inputs\[0\], and needs 1"),
        (every(inputs=()), "step 0 has 1 times and 0 rows of inputs"),
        (every(kept=((1.0,),)), r"step 0 has 1 coefficients in kept\[0\], and needs 2"),
        (every(kept=(0.0, 1.0)), r"step 0 has kept=\(0.0, 1.0\); give rows"),
        (every(kept=()), "step 1 reads k_0 in history, and the steps before it kept 0"),
        (every(kept=((0.0, 1.0, 0.5),)), "step 0 reads k_0 in kept, and the steps before"),
        (every(history=(0.0, 0.5)), "step 0 reads k_1 in history, and the steps before it kept 0"),
        (every(noise=1.0), "step 0 has noise=1.0, and stochastic says"),
        (every(end=0.9), "step 0 has end=0.9, and the next time is 0.25; end there"),
        (every(end=None), r"step 0 has times=\(0.0,\) and end=None; give numbers"),
        (every(times=(1.2,)), "step 0 evaluates the network at t=1.2; times are from 0"),
        (lambda steps: steps[:-1], "steps returned 3 steps for 5 times; return 4"),
        (lambda steps: None, "steps must return a list of Step, got NoneType"),
        (lambda steps: [1, 2], "steps must return a list of Step, got other things"),
    ],
)
def test_steps_that_do_not_fit_together_are_refused_by_their_number(change, message):
    for made in (
        lambda: plan(TwoStep(4, change=change), CondOT(), "velocity"),
        lambda: backward(TwoStep(4, change=change), CondOT(), "velocity"),
    ):
        with pytest.raises(UserError, match="solver=mine: ") as refusal:
            made()
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=f"solver=mine: {message}"):
        plan(TwoStep(4, change=change), CondOT(), "velocity")


def test_steps_that_fit_are_left_as_they_are():
    def padded(steps):  # history without weight needs nothing kept
        return [replace(steps[0], history=(0.0, 0.0)), *steps[1:]]

    as_lists = every(output=[1.0, 0.1], kept=[[0.0, 1.0]], inputs=[[1.0]], times=[0.5])
    for change in (None, padded, as_lists):
        assert len(plan(TwoStep(4, change=change), CondOT(), "velocity")) == 4
    for solver in (DDIM(4), DDPM(4), DPMSolverPP2M(4)):
        assert len(plan(solver, VariancePreserving(), "v", 3)) == 2
    for solver in (Euler(4), Heun(4), RK4(4)):
        assert len(backward(solver, CondOT(), "velocity")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_target_": "test_own_parts.Named"}, "has name='x/y', and files are named by it"),
        ({"_target_": "test_own_parts.TwoStep", "_partial_": True}, "makes no Solver; leave _par"),
        ({"_target_": "types.SimpleNamespace"}, "makes no Solver; give a subclass of bayesdiff"),
        ({"_target": "test_own_parts.TwoStep"}, "solver has no _target_; give that of a subclass"),
    ],
)
def test_what_makes_no_solver_is_refused_before_any_work(options, message, tmp_path):
    cfg = hydra_composes(smallest(tmp_path))
    OmegaConf.set_struct(cfg, False)
    cfg.solver = {"num_steps": 2, **options}
    with pytest.raises(UserError, match=message):
        pipeline.prepare(cfg)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("nowhere.Mine", "solver._target_=nowhere.Mine is not found: there is no module nowhere; "
         "the folder that nowhere.py lies in belongs in PYTHONPATH"),
        ("test_own_parts.TwoStpe", "test_own_parts has no TwoStpe; did you mean TwoStep?"),
        ("test_own_parts.TwoStep.on.off", "test_own_parts has no on"),
        ("broken_part.Mine", "broken_part cannot be imported: No module named 'nothing_there'"),
        ("unread_part.Mine", "unread_part cannot be imported: SyntaxError: "),
        ("test_own_parts.TwoStep", "unexpected keyword argument 'gridd'; test_own_parts.TwoStep "
         "takes change, denoise, grid, guidance, num_steps; did you mean grid?"),
    ],
)  # fmt: skip
def test_a_target_that_cannot_be_made_is_a_line_with_the_cure(options, message, tmp_path):
    (tmp_path / "broken_part.py").write_text("import nothing_there\n")
    (tmp_path / "unread_part.py").write_text("class Mine(:\n")
    cfg = OmegaConf.create({"solver": {"_target_": options, "num_steps": 2, "gridd": 1}})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(Exception) as error:  # noqa: B017, PT011 - Hydra's
            instantiate(cfg.solver)
        line = explain(error.value)
    assert message in line and "\n" not in line


def test_an_unknown_choice_and_a_file_that_is_no_yaml_say_where_to_look(tmp_path):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "odd.yaml").write_text("a: {_target_: b\n")
    for given, message in (
        (
            ["solver=ab2"],
            "one of your own is configs/solver/ab2.yaml here, or below --config-dir",
        ),
        (["scores=odd", f"hydra.searchpath=[file://{tmp_path}]"], "odd.yaml"),
    ):
        with pytest.raises(Exception) as error:  # noqa: B017, PT011 - Hydra's, PyYAML's
            hydra_composes(given)
        assert message in explain(error.value) and "\n" not in explain(error.value)


def test_a_file_that_a_shipped_one_stands_in_front_of_is_refused(tmp_path, monkeypatch):
    sources = [
        SimpleNamespace(path=str(path), schema="file") for path in (ROOT / "configs", tmp_path)
    ]
    runtime = SimpleNamespace(config_sources=sources, choices={"solver": "euler", "scores": ["a"]})
    hydra = SimpleNamespace(initialized=lambda: True, get=lambda: SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(shadows, "HydraConfig", hydra)
    own = tmp_path / "solver" / "euler.yaml"
    own.parent.mkdir()
    shadows.check_shadows()
    own.write_bytes((ROOT / "configs" / "solver" / "euler.yaml").read_bytes())
    shadows.check_shadows()  # the same
    own.write_text("_target_: mine.Euler\n")
    with pytest.raises(UserError, match=r"solver=euler: .*euler.yaml has the name of a shipped"):
        shadows.check_shadows()
    runtime.choices["solver"] = "heun"
    shadows.check_shadows()  # not chosen
    (tmp_path / "train.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"train: .*train.yaml has the name of a shipped file"):
        shadows.check_shadows()


def test_a_package_that_hydra_does_not_read_is_refused(tmp_path):
    folder = SimpleNamespace(path=str(tmp_path), schema="file")
    runtime = SimpleNamespace(config_sources=[folder], choices={"data": "stripes"})
    own = tmp_path / "data" / "stripes.yaml"
    own.parent.mkdir()
    for good in (
        "# @package _global_\n# stripes\na: 1\n",
        "\n# @package _global_\na: 1\n",
        "a: 1\n",
    ):
        own.write_text(good)
        shadows.refuse_shadows(runtime)
    for late in ("# stripes\n# @package _global_\na: 1\n", "a: 1\n#@package data\n"):
        own.write_text(late)
        with pytest.raises(UserError, match=r"data=stripes: .*stripes.yaml has # @package below"):
            shadows.refuse_shadows(runtime)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (3, "scores=3 are none"),
        ({"a": 3}, "scores.a=3 is no callable; give its _target_"),
        ({"a": lambda pictures: pictures}, "scores.a asks for pictures; a score is given"),
        ({"a": lambda: 0}, "scores.a asks for nothing"),
        ({"sum": lambda images: images}, "scores.sum has the name of map.sum"),
    ],
)
def test_what_is_no_score_is_refused(made, message):
    with pytest.raises(UserError, match=message):
        own_scores(made)


@pytest.mark.parametrize("made", [torch.abs, lambda images: images.mean(), lambda images: 1.0])
def test_a_score_must_give_a_number_for_every_image(made):
    own = own_scores({"bad": lambda images: made(images)})["own.bad"]
    with pytest.raises(
        UserError, match=r"scores.bad must give one number per image, a tensor \(3,\), got"
    ):
        own({"images": torch.rand(3, 1, 2, 2)})


@pytest.mark.parametrize("times", [[0, 0.5, 1], [0, 0.7, 0.6, 0.8, 1], [0, 0.2, 0.4, 0.6, 0.8]])
def test_times_of_ones_own_go_from_noise_to_data(times):
    with pytest.raises(UserError, match="must give 5 increasing times from 0 to 1"):
        time_grid(lambda path, num_steps: times, CondOT(), 4)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1j])
def test_a_score_must_give_finite_numbers(odd):
    def made(images):
        return torch.arange(3) * odd

    with pytest.raises(UserError, match="scores.bad gives .* for image .* of 3; give a finite"):
        own_scores({"bad": made})["own.bad"]({"images": torch.rand(3, 1, 2, 2)})


def test_a_score_must_leave_its_inputs_as_they_are():
    data = SimpleNamespace(images=torch.zeros(4, 1, 2, 2), num_classes=2)
    run = SimpleNamespace(data=SimpleNamespace(data=data), model=SimpleNamespace(condition=None))

    def blank(images):
        return images.zero_().flatten(1).sum(1)

    with pytest.raises(UserError, match="scores.blank changes its images, .*; work on images.clo"):
        try_scores(own_scores({"blank": blank}).values(), run)


def test_options_that_a_score_does_not_take_are_refused():
    options = {"a": {"_target_": "test_own_parts.every", "_partial_": True}}
    with pytest.raises(UserError, match="scores.a asks for nothing"):
        own_scores(instantiate(options))
    options["a"] = {"_target_": "test_own_parts.level", "_partial_": True, "flor": 1}
    with pytest.raises(UserError, match="scores.a does not work: .*'flor'; its YAML gives"):
        own_scores(instantiate(options))


def level(images):
    return images.flatten(1).mean(1)


def bare_images():
    return torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.arange(9) % 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "gives a tuple and no ImageData; end it with bayesdiff.data.images.hold_out"),
        ({"_partial_": True}, "is not called, for _partial_: true; leave _partial_ out"),
    ],
)
def test_a_source_that_gives_no_data_set_is_refused(more, message):
    options = OmegaConf.create({"_target_": "test_own_parts.bare_images", **more})
    with pytest.raises(
        UserError, match=f"data.source._target_=test_own_parts.bare_images {message}"
    ):
        source_data(options)

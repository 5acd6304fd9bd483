"""Names of folders: what tells runs apart can be read, and where a run is follows from content."""

import re

import pytest
import torch
from conftest import compose_list, smallest

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.runs.build import build
from bayesdiff.runs.defaults import damage_of, differences, named, preset, words
from bayesdiff.runs.settings import _learnt
from bayesdiff.storage.checkpoints import read_checkpoint
from bayesdiff.storage.same_kind import require_guidance

BARE = ("output_dir=/nowhere/that/is",)


def folder(tmp_path, *overrides):
    return build(compose_list([f"output_dir={tmp_path}", *overrides])).folder.name


def test_a_training_is_named_by_what_is_not_default(tmp_path):
    plain = folder(tmp_path)
    assert re.fullmatch(r"digits-flow-[0-9a-f]{8}", plain)
    rates = [folder(tmp_path, f"model.optimizer.lr={lr}") for lr in ("1e-4", "0.003")]
    assert [name.rpartition("-")[0] for name in rates] == [
        "digits-flow-lr_0.0001", "digits-flow-lr_0.003",
    ]  # fmt: skip
    seeds = {folder(tmp_path, "model=diffusion", f"seed={seed}") for seed in range(3)}
    assert {re.sub("-[0-9a-f]{8}$", "", name) for name in seeds} == {
        "digits-diffusion", "digits-diffusion-seed_1", "digits-diffusion-seed_2",
    }  # fmt: skip
    damaged = folder(tmp_path, "corruption=mislabelled", "data.source.corruption.share=0.2")
    assert damaged.startswith("digits-flow-corruption_mislabelled-share_0.2-")


def test_the_name_follows_from_values_not_from_typing(tmp_path):
    one = folder(tmp_path, "net.dropout=0.1", "trainer.max_epochs=7", "seed=0")
    two = folder(tmp_path, "trainer.max_epochs=7", "net.dropout=0.10", "model.optimizer.lr=1e-3")
    assert one == two and "max_epochs_7-dropout_0.1" in one
    assert folder(tmp_path, "solver.num_steps=9", "trainer.accelerator=cpu") == folder(tmp_path)


def test_a_training_of_an_older_name_is_found(tmp_path):
    name = folder(tmp_path, "seed=5")
    old = tmp_path / f"digits-flow-{name[-8:]}"
    old.mkdir()
    assert folder(tmp_path, "seed=5") == old.name
    assert folder(tmp_path, "seed=6") != old.name
    assert named(tmp_path, "a[1]", "-x_1", "0123456789abcdef").name == "a[1]-x_1-01234567"


def test_a_name_is_safe_everywhere_and_bounded():
    values = {f"part.key{i}": f"a/b=c,{i} 'ü'" * 9 for i in range(20)}
    text = words(values)
    assert re.fullmatch(r"[A-Za-z0-9_.+-]+", text) and len(text) < 90
    assert text.endswith("_more")
    assert words({}) == "" and words({"a.b": None, "c": True, "d": [0.5, 2]}) == (
        "-b_null-c_true-d_0.5_2"
    )
    assert words({"one.seed": 1}, ["two.seed"]) == "-one.seed_1"


def test_hydra_takes_such_a_path_as_it_is():
    path = "outputs/digits-flow-lr_0.0001-classes_3_8-and_2_more-0123abcd/checkpoints/last.ckpt"
    cfg = compose_list([f"ckpt_path={path}", f"+more=[{path}]"])
    assert cfg.ckpt_path == path and cfg.more == [path]


def test_presets_have_names_and_others_their_class():
    cfg = compose_list(["net=tiny", "path=vp_linear"])
    assert (preset("net", cfg.net), preset("path", cfg.path)) == ("tiny", "vp_linear")
    assert preset("net", compose_list(["net.dropout=0.5"]).net) == "UNet"


def test_differences_are_those_from_the_defaults_of_the_same_choices():
    cfg = compose_list(["model=diffusion", "solver=ddpm", "solver.num_steps=7", *BARE])
    assert differences(cfg, model="diffusion", solver="ddpm") == {"solver.num_steps": 7}
    more = differences(cfg, model="flow", solver="euler")
    assert {"path.schedule", "model.prediction", "solver.variance"} <= more.keys()
    assert not differences(compose_list(["experiment=rectify", *BARE])).keys() & {
        "repair.draws", "output_dir"
    }  # fmt: skip


@pytest.fixture
def cells(copied, compose, monkeypatch):
    """Finishes cells of the trained run without their pictures; names of their folders."""
    monkeypatch.setattr("bayesdiff.report.board.write", lambda *args, **options: [])
    return lambda *overrides: pipeline.run(compose("metrics.num_images=0", *overrides)).folder.name


def test_cells_of_two_sweeps_are_told_apart_in_their_names(cells):
    priors = [cells(f"laplace.prior_precision={prior}") for prior in (10, 100)]
    assert "-prior_precision_10-" in priors[0] and "-prior_precision_100-" in priors[1]
    intervals = [cells(f"uncertainty.skip_interval={k}") for k in (1, 3)]
    assert "skip_interval" not in intervals[0] and "-skip_interval_3-" in intervals[1]
    both = cells("uncertainty.skip_interval=3", "laplace.prior_precision=10")
    assert both == cells("laplace.prior_precision=10.0", "uncertainty.skip_interval=3")
    assert "prior_precision_10" in both and "skip_interval_3" in both


def test_weights_of_a_file_are_not_named_by_what_this_command_would_train(tmp_path, trained):
    taken = ("fit=false", f"ckpt_path={trained.checkpoint}")
    idle = ("model.optimizer.lr=0.5", "data.batch_size=64", "trainer.max_epochs=7")
    cfg = compose_list(smallest(tmp_path, *taken, *idle))
    run = build(cfg)
    assert not any(word in run.folder.name for word in ("lr_", "batch_size", "max_epochs"))
    assert _learnt(cfg) == {"lr": 1e-3, "epochs": 1, "batch_size": 128}
    with pytest.raises(UserError, match="sample_from=best chooses among the epochs"):
        build(compose_list(smallest(tmp_path, *taken, "sample_from=best")))


def test_guidance_needs_a_checkpoint_that_learnt_it(tmp_path):
    path = tmp_path / "a.ckpt"
    note = {"config": {"model": {"class_dropout": 0.0}}}
    torch.save({"state_dict": {"a": torch.ones(1)}, "bayesdiff": note}, path)
    there = read_checkpoint(path)
    require_guidance(path, there, {"solver": {"guidance": 1.0}})
    with pytest.raises(UserError, match="solver.guidance=2.0 needs a network.*class_dropout=0"):
        require_guidance(path, there, {"solver": {"guidance": 2.0}})


def test_what_only_shows_names_no_training_and_what_learns_does(tmp_path):
    """By the list that the key of a training goes by, and no other."""
    plain = folder(tmp_path)
    for only_shown in (
        "callbacks.training_progress=null", "callbacks=snapshots", "~callbacks.samples",
        "callbacks.learning_rate=null", "report.pdf=false", "callbacks.samples.grids=3",
    ):  # fmt: skip
        assert folder(tmp_path, only_shown) == plain
    bare = [folder(tmp_path, word) for word in ("~callbacks.ema", "callbacks.ema=null")]
    assert all(re.fullmatch(r"digits-flow-ema_null-[0-9a-f]{8}", name) for name in bare)
    assert "-decay_0.5-" in folder(tmp_path, "callbacks.ema.decay=0.5")


def test_what_is_taken_out_is_null_and_options_of_another_class_are_not_missed():
    cfg = compose_list(["~callbacks.ema", "~trainer.gradient_clip_val", *BARE])
    found = differences(cfg, model="flow", solver="euler")
    assert found == {"callbacks.ema": None, "trainer.gradient_clip_val": None}
    for other in ("path=vp_linear", "solver=ddpm", "corruption=mislabelled", "net=unet8"):
        cfg = compose_list(["model=diffusion", other, *BARE])
        found = differences(cfg, model="diffusion", corruption=damage_of(cfg) or "")
        assert [name for name, value in found.items() if value is None] == []

"""One run from Python: its configuration is that of the command line, its result is on disk."""

import re

import hydra
import pytest
from conftest import CONFIGS, SMALLEST, hydra_composes
from hydra import initialize_config_dir, version
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from bayesdiff.checks import UserError
from bayesdiff.pipeline import compose, run

WORDS = [
    (),
    ("seed=3", "net=tiny", "output_dir=/there", "solver.num_steps=7"),
    ("model=diffusion", "solver=sde", "+solver.order=2", "uncertainty.times=[0.2,0.5]"),
    ("experiment=filtering", "~filtering.maps.published", "logger=[tensorboard,csv]"),
]


@pytest.mark.parametrize("words", WORDS)
def test_a_configuration_is_what_hydra_composes(words):
    truth, made = hydra_composes(list(words)), compose(*words)
    assert made == truth
    assert OmegaConf.is_struct(made) == OmegaConf.is_struct(truth)


def test_a_sweeps_configuration_is_another():
    words = ["hparams_search=optuna", "objective=nfe"]
    assert compose(*words, config_name="sweep") == hydra_composes(words, "sweep")


def test_hydras_own_state_is_left_alone(monkeypatch):
    monkeypatch.setattr(version.VersionBase.instance(), "version_base", None)
    assert not GlobalHydra.instance().is_initialized()
    compose("net=tiny")
    assert not GlobalHydra.instance().is_initialized() and not HydraConfig.initialized()
    assert version.VersionBase.instance().version_base is None
    with initialize_config_dir(str(CONFIGS), version_base="1.2"):
        before = GlobalHydra.instance().hydra
        assert compose("seed=4").seed == 4
        assert GlobalHydra.instance().hydra is before
        assert version.getbase() == version.Version("1.2")
        assert hydra.compose("train", ["seed=5"]).seed == 5


def test_a_folder_of_ones_own_configurations(tmp_path, monkeypatch):
    own = tmp_path / "mine" / "solver"
    own.mkdir(parents=True)
    (own / "odd.yaml").write_text("_target_: bayesdiff.solvers.Euler\nnum_steps: 9\n")
    assert compose("solver=odd", config_dir=tmp_path / "mine").solver.num_steps == 9
    monkeypatch.chdir(tmp_path)
    assert compose("solver=odd", config_dir="mine").solver.num_steps == 9
    (own / "euler.yaml").write_text("_target_: mine.Euler\n")
    with pytest.raises(UserError, match="solver=euler: .* has the name of a shipped file"):
        compose("solver=euler", config_dir="mine")


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["model=gan"], {}, "unknown model 'gan'; choose from bfn, diffusion"),
        (["sede=1"], {}, "unknown option 'sede'; did you mean seed"),
        (["+seed=1"], {}, "seed is there already; leave out the +"),
        (["seed=1,2"], {}, "seed=1,2"),
        (["seed=[1"], {}, "seed=\\[1 cannot be read: no viable"),
        (["-m"], {}, "-m"),
        ([["seed=1"]], {}, "is no override; give each as a string"),
        ([], {"config_dir": "/nowhere"}, "config_dir=/nowhere is no folder"),
        ([], {"config_name": "tarin"}, "tarin"),
    ],
)
def test_what_the_command_line_refuses_is_one_line(words, options, message):
    with pytest.raises(UserError, match=message) as error:
        compose(*words, **options)
    assert "\n" not in str(error.value)


def test_a_run_leaves_images_and_their_maps(tmp_path, monkeypatch, without_reports):
    """In the current directory, without a command line: as in a script or a notebook."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [""])
    words = ["uncertainty=ensemble", "uncertainty.members=2", "uncertainty.export=png"]
    result = run(compose(*SMALLEST, *words, "data=digits", "metrics.num_images=0", "seed=7"))
    assert result.folder.resolve().is_relative_to(tmp_path / "outputs")
    assert result.samples.is_file()
    assert result.metrics["summed_variance/mean"] > 0
    names = sorted(path.name for path in (result.folder / "png").iterdir())
    assert len([n for n in names if re.search("png$", n)]) >= 8, names


def test_run_wants_a_configuration():
    with pytest.raises(UserError, match="run takes what compose gives, got 'data=digits'"):
        run("data=digits")

"""Every option of every group composes and instantiates; every file says what it is for."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from conftest import CONFIGS, ROOT, compose_list
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from bayesdiff.cli import explain
from bayesdiff.data.binarised import binarised
from bayesdiff.data.module import ImageDataModule
from bayesdiff.data.sources import digits
from bayesdiff.data.spaces import in_space
from bayesdiff.laplace.structures import check_settings
from bayesdiff.likelihoods import Gaussian
from bayesdiff.options.trainer import SUPPLIED
from bayesdiff.paths import (
    CondOT,
    GeometricAccuracy,
    Inflation,
    QuadraticAccuracy,
    VariancePreserving,
)
from bayesdiff.report.loggers import Loggers, check_loggers
from bayesdiff.runs import build
from bayesdiff.runs.callback_options import _named
from bayesdiff.runs.likelihood import build_likelihood
from bayesdiff.solvers.flow import RungeKutta
from bayesdiff.solvers.step import check_solver

FILES = sorted(CONFIGS.rglob("*.yaml"))
# Nothing without a pipeline's folder: tests/test_pretrained_command.py has them.
OF_A_FOLDER = {("model", "pretrained"), ("solver", "scheduler")}
SHARED = [path for path in FILES if "local" not in path.parts]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def every(group: str):
    names = [name for name in options(group) if (group, name) not in OF_A_FOLDER]
    assert names
    return pytest.mark.parametrize("name", names)


def composed(*overrides: str) -> DictConfig:
    cfg = compose_list(list(overrides))
    OmegaConf.resolve(cfg)
    return cfg


@pytest.fixture(scope="module")
def small_data() -> ImageDataModule:
    return ImageDataModule(digits(), batch_size=64)


@every("model")
def test_models(name, small_data):
    cfg = composed(f"model={name}", "net=tiny")
    # Of two values alone is what the usual Bayesian flow network can say.
    drawn = binarised(small_data.data, "frozen" if name == "bfn" else None)
    data = ImageDataModule(in_space(drawn, cfg.data.space), batch_size=64)
    model = build.build_model(cfg, data)
    paths = {"flow": CondOT, "diffusion": VariancePreserving, "bfn": QuadraticAccuracy}
    assert {**paths, "inflation": Inflation}[name] is type(model.path)
    check_solver(instantiate(cfg.solver), model.path, conditional=True)
    assert model.num_classes == (None if name in ("bfn", "inflation") else 10)


@every("data_type")
def test_data_types(name, small_data):
    cfg = composed("model=bfn", f"data_type={name}", "net=tiny")
    drawn = binarised(small_data.data, "frozen" if name == "binary" else None)
    data = ImageDataModule(in_space(drawn, cfg.data.space), batch_size=64)
    model = build.build_model(cfg, data)
    accuracy = QuadraticAccuracy if name in ("binary", "discrete") else GeometricAccuracy
    assert isinstance(model.path, accuracy)
    x, _ = model.corrupt(
        torch.randn(2, *data.space.shape), torch.randn(2, *data.space.shape), torch.rand(2)
    )
    assert model(x, torch.rand(2)).shape[1] == model.likelihood.channels(1)


@every("likelihood")
def test_likelihoods(name, small_data):
    cfg = composed(f"likelihood={name}", "net=tiny")
    model = build.build_model(cfg, small_data)
    assert model.likelihood.name.partition("-")[0] == name
    assert model.prediction in model.likelihood.predictions
    assert len(model.net.head.weight) == model.likelihood.channels(1)
    assert build_likelihood(cfg.model) == model.likelihood


@every("net")
@pytest.mark.parametrize("classes", [None, 10])
def test_networks(name, classes):
    size = {"unet28": 28, "unet32": 32, "unet64": 64}.get(name, 8)
    channels = 3 if size > 28 else 1
    options = {"in_channels": channels, "image_size": size, "num_classes": classes}
    shape = (channels, size, size)
    if name == "mlp":  # of points
        shape = (2,)
        options = {"shape": shape, "num_classes": classes}
    with torch.device("meta" if size > 32 else "cpu"):  # shapes alone where numbers cost seconds
        net = instantiate(composed(f"net={name}").net, **options, _convert_="all")
        x = torch.randn(2, *shape)
        assert net.eval()(x, torch.rand(2), None).shape == x.shape


@every("condition")
def test_conditions(name):
    cfg = composed(f"condition={name}").model.condition
    assert callable(instantiate(cfg, _partial_=True))


@every("path")
def test_paths(name):
    path = instantiate(composed(f"path={name}").path)
    space = SimpleNamespace(shape=(1, 8, 8), variances=torch.rand(1, 8, 8) + 0.1)
    path = path.for_likelihood(Gaussian()).for_space(space)
    c = path.coefficients(torch.linspace(0, path.last_time, 9))
    assert (c.alpha.diff(dim=0) > 0).all() and (c.sigma.diff(dim=0) < 0).all()


@every("solver")
def test_solvers(name):
    solver = instantiate(composed(f"solver={name}").solver)
    path = CondOT() if isinstance(solver, RungeKutta) else VariancePreserving("cosine")
    check_solver(solver, path, conditional=False)
    assert solver.num_steps >= 10


@every("uncertainty")
def test_estimators(name):
    cfg = composed(f"uncertainty={name}")
    estimator = instantiate(cfg.uncertainty)
    estimator.check(instantiate(cfg.solver))
    assert estimator.name == {"auto": "refined"}.get(name, name)


@every("laplace")
def test_posteriors(name):
    laplace = composed(f"laplace={name}").laplace
    numbers = [laplace.sigma_noise, laplace.prior_precision, laplace.n_eff, laplace.rank]
    check_settings(laplace.structure, *numbers, laplace.time_bins)
    assert laplace.structure == name


@every("data")
def test_data_sets(name, tmp_path):
    """The source is found and takes its options; digits and points need no file."""
    cfg = composed(f"data={name}")
    if cfg.data.source._target_.startswith("bayesdiff.data.toys."):
        assert len(instantiate(cfg.data.source, points=300).images) == 300
        return
    embedded = name in ("digits", "binary_digits")
    cfg = composed(f"data={name}", f"data.root={'null' if embedded else tmp_path}")
    if "download" in cfg.data.source:
        cfg.data.source.download = False
    if embedded:
        assert instantiate(cfg.data.source).num_classes == 10
    else:
        with pytest.raises(HydraException) as error:
            instantiate(cfg.data.source)
        assert str(tmp_path) in explain(error.value), explain(error.value)
    assert cfg.data.name == name
    assert cfg.trainer.max_epochs == cfg.data.epochs
    assert cfg.data.batch_size > 0 and cfg.data.flip in (True, False)


@every("corruption")
def test_corruptions(name):
    clean = instantiate(composed().data.source)
    damaged = instantiate(composed(f"corruption={name}").data.source)
    assert damaged.fingerprint != clean.fingerprint
    assert torch.equal(damaged.test_images, clean.test_images)


@every("trainer")
def test_trainers(name):
    cfg = composed(f"trainer={name}", *(["trainer.accelerator=cpu"] if name == "gpu" else []))
    trainer = instantiate(cfg.trainer, precision="32-true", logger=False, _convert_="all")
    assert trainer.max_epochs == cfg.data.epochs
    assert trainer.num_devices == (2 if name in ("ddp", "fsdp") else 1)


@every("callbacks")
def test_callbacks(name, tmp_path):
    cfg = composed(f"callbacks={name}")
    made = _named(cfg, tmp_path)
    assert sorted(made) == sorted(cfg.callbacks)
    assert all(isinstance(callback, Callback) for callback in made.values())


@every("logger")
def test_loggers(name, tmp_path):
    options = composed(f"logger={name}").logger
    assert list(options) == [name]  # so that several go side by side
    if name == "wandb":
        pytest.importorskip("wandb")
    check_loggers(options)
    to = Loggers(options, tmp_path / "digits", "digits", "training")
    made = to.make(options[name])
    assert isinstance(made, Logger)
    if name != "wandb":  # its own service names folders
        assert Path(made.log_dir) == tmp_path / "digits" / name


def test_every_argument_of_the_trainer_is_listed():
    """With Lightning's own default, save for those that are chosen here."""
    options = OmegaConf.to_container(OmegaConf.load(CONFIGS / "trainer" / "default.yaml"))
    there = inspect.signature(lightning.Trainer.__init__).parameters
    assert options.keys() - {"_target_"} == there.keys() - {"self"} - SUPPLIED.keys()
    chosen = (
        "devices max_epochs gradient_clip_val precision num_sanity_val_steps log_every_n_steps "
        "enable_model_summary"
    )
    for name in options.keys() - {"_target_", *chosen.split()}:
        assert options[name] == there[name].default, name


@every("metrics")
def test_metrics(name):
    metrics = composed(f"metrics={name}").metrics
    assert metrics.features == name and metrics.num_images >= 1000


@every("debug")
def test_debug(name):
    cfg = composed(f"debug={name}")
    assert cfg.trainer.max_epochs >= 1
    instantiate(cfg.trainer, precision="32-true", logger=False, _convert_="all")


@every("experiment")
def test_experiments(name):
    """A study composes, and its first line says how to run it."""
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    assert f"experiment={name}" in text
    cfg = composed(f"experiment={name}")
    build.check_values(cfg)
    instantiate(cfg.solver), instantiate(cfg.uncertainty), instantiate(cfg.path)


@every("shift")
def test_shifts(name):
    """Other data compose for the study of beliefs, in the size of the run's own."""
    cfg = composed("experiment=beliefs", "data=binary_digits", f"shift@beliefs.shift={name}")
    found = OmegaConf.to_container(cfg.beliefs.shift, resolve=True)
    assert found.get("resize", 16) == 16
    assert found.get("_partial_") or found["dataset"]


@every("space")
def test_spaces(name, small_data):
    """A space composes and keeps what it is given."""
    size = ["data.space.coder.size=64"] if name == "rotation" else []
    cfg = composed(f"space={name}", *size)
    space = instantiate(cfg.data.space, small_data.data)
    images = small_data.data.images[:3]
    assert torch.equal(space.decode(space.encode(images)), images)


@every("hparams_search")
def test_searches(name):
    """A search composes with a sweeper of its name, over keys that there are."""
    cfg = compose_list([f"hparams_search={name}"], "sweep", return_hydra_config=True)
    assert cfg.hydra.sweeper._target_ == "hydra_plugins.bayesdiff_search.OptunaSearch"
    for key in cfg.hydra.sweeper.params:
        assert OmegaConf.select(cfg, key, throw_on_missing=True) is not None, key


def test_every_group_is_tested():
    names = {path.relative_to(CONFIGS).parts for path in FILES}
    groups = {parts[0] for parts in names if len(parts) > 1}
    here = set(re.findall(r'^@every\("(\w+)"\)', Path(__file__).read_text(), re.MULTILINE))
    assert groups - {"hydra", "local"} == here


def test_no_argument_means_digits_and_no_file():
    cfg = composed()
    assert (cfg.data.name, cfg.data.root, cfg.fit) == ("digits", None, True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_every_file_says_what_it_is_for(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines[0].startswith("# @package "):
        lines = lines[1:]
    assert re.match(r"# \w.{15,}", lines[0]), lines[0]
    assert max(len(line) for line in lines) <= 100


def leaves(cfg: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(cfg, dict):
        return {prefix: cfg}
    return {k: v for key, x in cfg.items() for k, v in leaves(x, f"{prefix}.{key}").items()}


# Read by name in the package rather than passed to a constructor.
READ = {"name", "root", "epochs"}


def test_no_key_is_left_unused(tmp_path):
    """What is in a file is read: passed on by instantiate, or named in the package."""
    code = "\n".join(path.read_text() for path in (ROOT / "bayesdiff").rglob("*.py"))
    for path in SHARED:
        if {"hydra", "experiment", "debug"} & set(path.parts):
            continue
        for key in leaves(OmegaConf.to_container(OmegaConf.load(path))):
            name = key.rpartition(".")[2]
            if name in READ or key.startswith(".defaults"):
                continue
            passed = "_target_" in path.read_text()  # an unknown one fails to instantiate
            assert passed or re.search(rf"\b{name}\b", code), f"{path.name}: {key} is not used"


@pytest.mark.parametrize(
    "override",
    ["foo=1", "data.foo=1", "model.foo=1", "solver.foo=1", "metrics.foo=1", "trainer.foo=1"],
)
def test_unknown_keys_are_refused(override):
    with pytest.raises(HydraException) as error:
        composed(override)
    assert explain(error.value).startswith(f"unknown option '{override[:-2]}'")


def test_unknown_keys_of_constructors_are_refused():
    for group in ("solver", "uncertainty", "path"):
        with pytest.raises(HydraException, match="foo|takes no arguments"):
            instantiate(composed(f"+{group}.foo=1")[group])


def test_hydra_leaves_nothing_behind():
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = GlobalHydra.instance().config_loader().load_configuration("train", [], "RUN")
    assert cfg.hydra.output_subdir is None and cfg.hydra.run.dir == "."
    assert cfg.hydra.job.chdir is False
    for logging in (cfg.hydra.job_logging, cfg.hydra.hydra_logging):
        assert set(logging.handlers) == {"console"}  # no train.log where one happens to stand
        assert logging.handlers.console.stream == "ext://sys.stderr"

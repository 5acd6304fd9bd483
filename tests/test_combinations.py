"""Any combination of options either runs at the smallest size or is refused in one line."""

import logging
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import DRAWS, QUICK_CLASSIFIER, compose_list, smallest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from bayesdiff import pipeline
from bayesdiff.cli import one_line_errors
from bayesdiff.report import board

GROUPS: dict[str, list[str]] = {
    "model": ["flow", "diffusion"],
    "path": ["cond_ot", "vp_cosine", "vp_linear", "vp_scaled_linear"],
    "solver": ("euler heun midpoint rk4 ddim ddpm dpm1 dpm2 dpmpp_2m pf_ode sde".split()),
    "uncertainty": (
        "ensemble linearised refined published total_variance cross_covariance mc_dropout "
        "deep_ensemble checkpoints swag variance_head".split()
    ),
    "laplace": (
        "full diag kron empirical_fisher empirical_fisher_published hessian_free prior_only "
        "subspace".split()
    ),
    "corruption": ["null", "mislabelled", "truncated", "undertrained"],
    "callbacks": ["default", "snapshots"],
    "debug": ["null", "fdr"],
    "logger": ["tensorboard", "csv", "null"],
}
# What no option means; quotes keep the words from being numbers.
ODD = [
    "0",
    "-1",
    "0.5",
    "1e30",
    "nan",
    "inf",
    "-inf",
    "null",
    "true",
    "abc",
    "''",
    "[1,2]",
    "{a:1}",
]
OPTIONS: dict[str, list[str]] = {
    "seed": ["0", "1"],
    "fit": ["true", "false"],
    "data.batch_size": ["32", "128", "1497", "1498"],
    "data.flip": ["true", "false"],
    "model.prediction": ["velocity", "noise", "data", "v", "score"],
    "model.num_classes": ["auto", "10", "3"],
    "model.class_dropout": ["0", "0.1", "1"],
    "model.time_sampling": ["uniform", "logit_normal"],
    "model.warmup_steps": ["0", "1", "500"],
    "model.optimizer.lr": ["1e-3", "1e-9"],
    "net.channels": ["[8]", "[8,8]", "[8,16,24]", "[7,9]", "[]", "8"],
    "net.blocks": ["1", "2"],
    "net.attention": ["true", "false"],
    "net.patch": ["1", "2", "3"],
    "net.head_kernel": ["1", "3", "2", "9"],
    "net.dropout": ["0", "0.5", "1"],
    "path.timesteps": ["1000", "2", "1"],
    "path.schedule": ["linear", "cosine"],
    "solver.num_steps": ["1", "2", "5"],
    "solver.guidance": ["1", "2.5", "-1"],
    "solver.grid": ["uniform", "quadratic", "log_snr", "cubic"],
    "solver.eta": ["0", "0.3", "1", "2"],
    "solver.r1": ["0.5", "1", "2"],
    "solver.variance": ["large", "small"],
    "laplace.structure": ["full", "diag", "kron"],
    "laplace.subset": ["head", "last_block"],
    "laplace.probes": ["1", "all"],
    "laplace.rank": ["1", "73", "100"],
    "laplace.sigma_noise": ["mle", "1e-3", "mle_per_time"],
    "laplace.prior_precision": ["1", "1e-12", "1e12", "evidence"],
    "laplace.n_eff": ["1", "1e-6", "60000"],
    "laplace.draws": ["1", "2"],
    "laplace.num_images": ["1", "16", "64", "1497", "1498"],
    "laplace.batch_size": ["1", "7", "256"],
    "laplace.time_bins": ["1", "3", "64", "1000"],
    "laplace.seed": ["0", "3"],
    "uncertainty.members": ["2", "3", "1", "[]"],
    "uncertainty.noise_members": ["0", "2", "1"],
    "uncertainty.noise_draws": ["0", "2"],
    "uncertainty.draws": ["1", "2", "all"],
    "uncertainty.derivative": ["exact", "difference", "bfloat16", "auto"],
    "uncertainty.skip_interval": ["1", "2", "3", "9"],
    "uncertainty.mc_samples": ["1", "2", "3"],
    "uncertainty.covariance": ["uncentred", "centred", "antithetic", "stein"],
    "uncertainty.var_x": ["true", "false"],
    "uncertainty.clamp": ["true", "false"],
    "uncertainty.gam2_at": ["realised", "mean"],
    "uncertainty.ddpm_fix": ["true", "false"],
    "uncertainty.cfg_joint": ["true", "false"],
    "uncertainty.shared": ["true", "false"],
    "uncertainty.p": ["0.1", "0.9", "1"],
    "uncertainty.mask": ["fixed", "fresh", "none"],
    "uncertainty.budget": ["1.4", "0.1", "50"],
    "uncertainty.products": ["1", "4", "99"],
    "uncertainty.train_images": ["8", "24"],
    "uncertainty.epochs": ["1", "2"],
    "uncertainty.num_images": ["1", "2", "3"],
    "uncertainty.batch_size": ["1", "2", "5"],
    "uncertainty.max_memory": ["4", "1e-9"],
    "uncertainty.times": ["[]", "[0.5]", "[0.2,0.9]", "[0.9,0.2]", "[1.5]"],
    "uncertainty.units": ["model", "unit"],
    "uncertainty.validate": ["true", "false"],
    "uncertainty.validate_images": ["3", "16"],
    "uncertainty.validate_members": ["2", "1"],
    "metrics.num_images": ["0", "2", "3"],
    "metrics.batch_size": ["1", "2"],
    "metrics.features": ["classifier"],
    "trainer.max_epochs": ["1", "2"],
    "trainer.precision": ["32-true", "bf16-mixed", "64-true"],
    "trainer.gradient_clip_val": ["1", "null"],
    "trainer.check_val_every_n_epoch": ["1", "2"],
    "callbacks.ema": ["null"],
    "callbacks.ema.decay": ["0", "0.9", "1"],
    "callbacks.snapshots.keep": ["2", "1"],
    "callbacks.snapshots.every": ["1", "5"],
    "process_timeout": ["10"],
}  # fmt: skip
# A run of less than a second, whatever else is chosen.
TINY = (
    "solver.num_steps=2", "uncertainty.num_images=2", "metrics.num_images=2",
    "laplace.num_images=24", "data.batch_size=32",
)  # fmt: skip


@cache
def known_options(groups: tuple[str, ...]) -> list[str]:
    """Options that there are under a choice of groups."""
    try:
        cfg = compose_list(list(groups))
    except Exception:  # that choice is refused later
        return sorted(OPTIONS)
    missing = object()
    return [n for n in sorted(OPTIONS) if OmegaConf.select(cfg, n, default=missing) is not missing]


@st.composite
def choices(draw: st.DrawFn) -> list[str]:
    """Overrides as on a command line: some groups, some options, now and then an odd value."""
    names = draw(st.lists(st.sampled_from(sorted(GROUPS)), max_size=4, unique=True))
    groups = {name: draw(st.sampled_from(GROUPS[name])) for name in names}
    few = DRAWS.get(groups.get("uncertainty", "ensemble"), ())
    options = dict(word.split("=") for word in (*TINY, *few))
    own = known_options(tuple(f"{name}={value}" for name, value in groups.items()))
    own = own if draw(st.integers(0, 9)) else sorted(OPTIONS)  # now and then another group's
    for name in draw(st.lists(st.sampled_from(own), max_size=5, unique=True)):
        odd = draw(st.integers(0, 9)) == 9
        options[name] = draw(st.sampled_from(ODD if odd else OPTIONS[name]))
    return [f"{name}={value}" for name, value in (groups | options).items()]


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all, so that the same training is made once."""
    return tmp_path_factory.mktemp("combinations")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(*QUICK_CLASSIFIER)
    monkeypatch.setattr(board, "write", lambda *args, **kwargs: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    logging.disable(logging.INFO)


def runs_or_is_refused(output_dir: Path, overrides: list[str]) -> bool:
    """Whether it runs; anything but a run or a line is an error."""
    started = []
    real = L.Trainer.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L.Trainer, "fit", lambda *a, **k: started.append(1) or real(*a, **k))
        try:
            with one_line_errors():
                result = pipeline.run(compose_list(smallest(output_dir, *overrides)))
        except SystemExit as stop:
            line = str(stop.code)
            assert line.startswith("error: ") and "\n" not in line and len(line) < 600, line
            assert not started or any(late in line for late in LATE), f"only after work: {line}"
            return False
    assert (result.folder / "metrics.json").is_file()
    return True


# What only the trained weights can tell.
LATE = ("is singular in float64",)
FAST = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@given(overrides=choices())
@settings(FAST, max_examples=20)
def test_a_few_combinations(output_dir, overrides):
    runs_or_is_refused(output_dir, overrides)


@pytest.mark.slow
@given(overrides=choices())
@settings(FAST, max_examples=500, derandomize=False)
def test_many_combinations(output_dir, overrides):
    runs_or_is_refused(output_dir, overrides)

"""The composer of the tests makes what Hydra makes."""

import pytest
from conftest import compose_list, hydra_composes
from omegaconf import OmegaConf

CHOICES = [
    [],
    ["seed=3", "net=tiny", "output_dir=/there", "solver.num_steps=7"],
    ["model=diffusion", "solver=sde", "+solver.order=2", "uncertainty.times=[0.2,0.5]"],
    ["net=tiny", "net.channels=[8,8]", "callbacks.samples=null", "++trainer.profiler=simple"],
    ["seed=1", "experiment=filtering", "~filtering.maps.published", "seed=2"],
    ["logger=[tensorboard,csv]", "corruption=truncated", "~callbacks.ema", "~debug"],
]
REFUSED = [
    ["model=gan"],
    ["model=3"],
    ["sampler=euler", "seed=1"],
    ["+seed=1"],
    ["~nothing.here"],
    ["seed=1,2"],
    ["seed=[1"],
    ["net.width=3", "model=diffusion"],
]


def content(overrides, composer):
    cfg = composer(overrides)
    return OmegaConf.to_container(cfg), OmegaConf.is_struct(cfg), OmegaConf.is_readonly(cfg)


@pytest.mark.parametrize("overrides", CHOICES)
def test_a_configuration_is_that_of_hydra(overrides):
    assert content(overrides, compose_list) == content(overrides, hydra_composes)


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_hydra_refuses_is_refused_in_its_words(overrides):
    with pytest.raises(Exception) as of_hydra:  # noqa: B017
        hydra_composes(overrides)
    with pytest.raises(type(of_hydra.value)) as here:
        compose_list(overrides)
    assert str(here.value) == str(of_hydra.value)


def test_each_is_a_copy_of_its_own():
    compose_list(["net=tiny"]).net.channels.append(99)
    assert 99 not in compose_list(["net=tiny"]).net.channels
    assert compose_list(["net=tiny", "seed=4"]).seed == 4 != compose_list(["net=tiny"]).seed

from omegaconf import DictConfig
from bayesdiff.build import build
from bayesdiff.training import fit


def run(cfg: DictConfig) -> None:
    r = build(cfg)
    fit(r)

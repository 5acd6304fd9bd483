"""The likelihood that a configuration names."""

from hydra.utils import instantiate
from omegaconf import DictConfig

from bayesdiff.checks import UserError
from bayesdiff.likelihoods import Gaussian, Likelihood
from bayesdiff.options.targets import arguments
from bayesdiff.options.values import plain


def build_likelihood(options: DictConfig) -> Likelihood:
    """The likelihood that a model's options name, a Gaussian where they name none.

    Raises:
        UserError: for a word, or options that it does not take.
    """
    given = options.get("likelihood")
    if given is None:
        return Gaussian()
    if not isinstance(given, DictConfig) or "_target_" not in given:
        raise UserError(
            f"model.likelihood={plain(given)!r} is no likelihood; choose it by name, as in "
            "likelihood=bernoulli"
        )
    target = str(given.get("_target_"))
    known = arguments(target)
    extra = [name for name in plain(given) if known and name not in {"_target_", *known}]
    if extra:
        raise UserError(f"model.likelihood.{extra[0]} is no option of {target}; leave it out")
    made: Likelihood = instantiate(given, _convert_="all")
    return made

from typing import cast

from bayesdiff.checks import UserError
from bayesdiff.likelihoods.bernoulli import Bernoulli
from bayesdiff.likelihoods.categorical import Categorical
from bayesdiff.likelihoods.classes import Classes
from bayesdiff.likelihoods.discretised import Discretised
from bayesdiff.likelihoods.gaussian import Gaussian
from bayesdiff.likelihoods.likelihood import ClassLikelihood, Likelihood

__all__ = [
    "Bernoulli",
    "Categorical",
    "ClassLikelihood",
    "Classes",
    "Discretised",
    "Gaussian",
    "Likelihood",
    "check_noise_level",
    "class_likelihood_of",
    "likelihood_of",
]

_GAUSSIAN = Gaussian()


def likelihood_of(model: object) -> Likelihood:
    """The likelihood of a module; a user's own that says nothing of it has a Gaussian one.

    Example:
        >>> likelihood_of(object()).name
        'gaussian'
    """
    return getattr(model, "likelihood", _GAUSSIAN)


def check_noise_level(model: object, who: str, objective: str = "likelihood") -> None:
    """Refuse a model whose likelihood has no noise level.

    Args:
        model: trained or not.
        who: is about that, for the message.
        objective: of the curvature; the likelihood alone has a noise level.

    Raises:
        UserError: if it has none.

    Example:
        >>> from types import SimpleNamespace
        >>> check_noise_level(SimpleNamespace(likelihood=Gaussian()), "my study")
        >>> check_noise_level(SimpleNamespace(likelihood=Bernoulli()), "my study")
        Traceback (most recent call last):
            ...
        bayesdiff.checks.UserError: my study is about a Gaussian with a sigma_noise, likelihood=...
    """
    if objective != "likelihood":
        raise UserError(
            f"{who} is about a Gaussian with a sigma_noise, laplace.objective={objective} has "
            "none; use laplace.objective=likelihood"
        )
    likelihood = likelihood_of(model)
    if not likelihood.scaled:
        raise UserError(
            f"{who} is about a Gaussian with a sigma_noise, likelihood={likelihood.name} has none;"
            " use likelihood=gaussian"
        )


def class_likelihood_of(model: object, who: str) -> ClassLikelihood:
    """The likelihood of a module, if it is one of classes.

    Args:
        model: trained or not.
        who: is about classes, for the message.

    Raises:
        UserError: if it is of numbers.

    Example:
        >>> from types import SimpleNamespace
        >>> class_likelihood_of(SimpleNamespace(likelihood=Bernoulli()), "my study").name
        'bernoulli'
        >>> class_likelihood_of(SimpleNamespace(likelihood=Gaussian()), "my study")
        Traceback (most recent call last):
            ...
        bayesdiff.checks.UserError: my study is about classes, likelihood=gaussian is of ...
    """
    likelihood = likelihood_of(model)
    if not likelihood.discrete:
        raise UserError(
            f"{who} is about classes, likelihood={likelihood.name} is of numbers; use model=bfn "
            "data_type=binary, or data_type=discrete"
        )
    return cast(ClassLikelihood, likelihood)

"""What a network predicts, and exact conversions between the four kinds.

Every kind is a linear mix of data and noise, prediction = r x_1 + s x_0, and so is
x_t = alpha x_1 + sigma x_0. Two such mixes determine any third one:
target = p x_t + q prediction with two coefficients per time.
"""

from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.paths.probability_path import PathCoefficients

PREDICTIONS = ("velocity", "noise", "data", "v", "flow", "score")


def mix(kind: str, path: PathCoefficients) -> tuple[Tensor, Tensor]:
    """Weights (r, s) of data and noise in a prediction of this kind, shaped as the coefficients.

    ``velocity`` is dx_t/dt; ``v`` is alpha x_0 - sigma x_1 (Salimans and Ho 2022, appendix D);
    ``flow`` is minus the velocity, as networks of diffusers give it; ``score`` is -x_0 / sigma
    (Song et al. 2021, eq. 7), the gradient of ln p(x_t | x_1).

    Raises:
        UserError: for an unknown kind.
    """
    zero = path.alpha * 0
    if kind == "velocity":
        return path.d_alpha, path.d_sigma
    if kind == "noise":
        return zero, zero + 1
    if kind == "data":
        return zero + 1, zero
    if kind == "v":
        return -path.sigma, path.alpha
    if kind == "flow":
        return -path.d_alpha, -path.d_sigma
    if kind == "score":
        return zero, -1 / path.sigma
    raise UserError(f"unknown model.prediction {kind!r}; choose from {', '.join(PREDICTIONS)}")


def convert(source: str, target: str, path: PathCoefficients) -> tuple[Tensor, Tensor]:
    """(p, q), each of the shape of the coefficients, with target = p x_t + q source.

    The pair is singular where x_t and the source do not determine the target (noise at alpha = 0,
    data at sigma = 0); they are then infinite or nan.

    Example:
        >>> from bayesdiff.paths import CondOT
        >>> at = CondOT().coefficients(torch.tensor(0.25))
        >>> p, q = convert("velocity", "data", at)  # x_1 = x_t + (1 - t) v
        >>> float(p), float(q)
        (1.0, 0.75)
    """
    if source == target:
        return path.alpha * 0, path.alpha * 0 + 1
    r, s = mix(source, path)
    r_target, s_target = mix(target, path)
    determinant = path.alpha * s - path.sigma * r
    p = (r_target * s - s_target * r) / determinant
    q = (path.alpha * s_target - path.sigma * r_target) / determinant
    return p, q

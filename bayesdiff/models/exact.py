"""The exact prediction for a finite set of data, in the place of a network's."""

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.models.generative import GenerativeModel
from bayesdiff.paths import ProbabilityPath
from bayesdiff.paths.prediction import mix

_AT_ONCE = 2**24  # numbers of a block of distances' differences


class ExactPrediction(nn.Module):
    """The mean of a prediction over which of the reference states a state came from.

    With w_j proportional to exp(-sum_i (x_i - alpha_i x_1ji)^2 / (2 sigma_i^2)) it is the mean
    over j of r x_1j + s (x - alpha x_1j) / sigma: the minimiser of the training loss over all
    functions, for data that are the references alone. Far from all of them it is that of the
    nearest one.

    Args:
        path: probability path.
        prediction: what is predicted: velocity, noise, data or v.
        references: states ``(N, *shape)``.
    """

    references: Tensor
    time_dtype = torch.float64

    def __init__(self, path: ProbabilityPath, prediction: str, references: Tensor) -> None:
        super().__init__()
        self.path, self.prediction = path, prediction
        self.register_buffer("references", references)
        self.head = nn.Identity()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Prediction for states ``(B, *shape)`` at times ``t (B,)``, all the same."""
        return self.features(x, t, y)

    def features(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The prediction itself.

        Raises:
            UserError: at a time without noise, where a state is one of the references or none,
                and for several times.
        """
        if bool((t != t[0]).any()):
            raise UserError("the exact prediction is of one time for all states; give equal times")
        c = self.path.coefficients(t[0])
        if not bool(c.sigma.all()):
            raise UserError(
                f"the exact prediction has no value at t={float(t[0]):g}, where no noise is left; "
                "sample with solver=euler or ddim, and go to latents on a path with noise there, "
                "such as path=inflation with kernel=constant"
            )
        alpha, sigma = c.alpha.to(x), c.sigma.to(x)
        r, s = (value.to(x) for value in mix(self.prediction, c))
        data = torch.cat([self._mean(part, alpha, sigma) for part in x.split(self._rows)])
        return r * data + s * (x - alpha * data) / sigma

    def fold(self, output: Tensor) -> Tensor:
        """The output."""
        return output

    @property
    def _rows(self) -> int:
        return max(1, _AT_ONCE // max(1, self.references.numel()))

    def _mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        references = self.references.to(x)
        away = ((x[:, None] - alpha * references) / sigma).flatten(2).square().sum(2)
        weights = torch.softmax(-away / 2, 1)
        return (weights @ references.flatten(1)).view(x.shape)


def exact_model(path: ProbabilityPath, prediction: str, references: Tensor) -> GenerativeModel:
    """A model that follows the exact score of a set of states, with nothing to be trained.

        model = exact_model(path, "v", states)
        latents = encode(model, Heun(100), states)

    Args:
        path: made ready for states of this shape.
        prediction: velocity, noise, data or v.
        references: states ``(N, *shape)``.

    Raises:
        UserError: for no states.
    """
    if not references.numel():
        raise UserError("the exact prediction is of a set of states, and there is none; give some")
    net = ExactPrediction(path, prediction, references)
    return GenerativeModel(net, path, prediction, torch.optim.SGD).eval()

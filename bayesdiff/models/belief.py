"""A network that is told beliefs in place of states: Bayesian flow networks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.likelihoods import Likelihood
from bayesdiff.networks.carrying import CarryingConv2d, CarryingLinear
from bayesdiff.networks.wrapped import WrappedNetwork
from bayesdiff.paths import ProbabilityPath
from bayesdiff.paths.bayesian_flow import AccuracyPath, accuracy_path


class BeliefNetwork(WrappedNetwork):
    """forward = fold(head(features(x, t, y))), with a network that sees what a belief says of x.

    Args:
        net: whose features are used; its head is replaced by a wider one.
        path: with an accuracy.
        likelihood: whose beliefs they are.
        skip: whether the head sees the belief itself beside the features, so that it can repeat it
            late, when little is left to be said.
        residual: whether the output starts from what the belief itself says, and the head from
            zero: untrained, it is then the exact posterior of independent values. Of numbers, the
            head sees its features in units of the belief's spread as well, as late corrections
            are that small.

    Raises:
        UserError: for a path that is no Bayesian flow, or a residual of a likelihood of numbers.

    Example:
        >>> from bayesdiff.likelihoods import Bernoulli
        >>> from bayesdiff.networks import UNet
        >>> from bayesdiff.paths import QuadraticAccuracy
        >>> path, likelihood = QuadraticAccuracy(), Bernoulli()
        >>> unet = UNet(in_channels=1, image_size=8, channels=(8,), blocks=1)
        >>> net = BeliefNetwork(unet, path, likelihood, residual=True)
        >>> x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.8])
        >>> own = likelihood.belief_logits(x, path.accuracy(t).view(2, 1, 1, 1))
        >>> torch.allclose(net(x, t).double(), own, atol=1e-4)  # untrained: what the belief says
        True
    """

    def __init__(
        self,
        net: Any,
        path: ProbabilityPath,
        likelihood: Likelihood,
        skip: bool = True,
        residual: bool = False,
    ) -> None:
        super().__init__(net)
        for name, value in (("skip", skip), ("residual", residual)):
            if not isinstance(value, bool):
                raise UserError(f"model.wrapper.{name} must be true or false, got {value!r}")
        self.path: AccuracyPath = accuracy_path(path, "model.wrapper")
        self.likelihood = likelihood
        self.skip, self.residual = skip, residual
        self.patch = getattr(net, "patch", 1)
        self.scaled = residual and not likelihood.discrete
        if residual:  # refuses a likelihood without
            likelihood.belief_logits(torch.zeros(1, likelihood.channels(1)), torch.zeros(1, 1))
        self.head = self._wider(net.head)
        net.head = nn.Identity()

    def features(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Input of the head: features of the belief, the belief, and its logits behind them."""
        accuracy = self.path.accuracy(t).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        belief = self.likelihood.belief(x, accuracy)
        parts = [self.net.features(belief, t, y)]
        if self.skip:
            parts.append(self._unfold(belief))
        if self.scaled:
            parts += [part * (1 + accuracy).rsqrt() for part in parts]
        if self.residual:
            parts.append(self._unfold(self.likelihood.belief_logits(x, accuracy)))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _unfold(self, values: Tensor) -> Tensor:
        """States as the features lie: what ``fold`` undoes."""
        if values.ndim == 4:
            return F.pixel_unshuffle(values, self.patch)
        return values.flatten(1)

    def _wider(self, head: Any) -> nn.Module:
        """A new head that sees the belief as well, zero where it corrects the belief's logits."""
        if not isinstance(head, (nn.Conv2d, nn.Linear)):
            raise UserError(
                f"the head is a {type(head).__name__}; model=bfn needs an nn.Conv2d or nn.Linear "
                "as the network's last layer"
            )
        outputs, bias = len(head.weight), head.bias is not None
        seen = self._belief_channels(outputs) if self.skip else 0
        made: nn.Module
        if isinstance(head, nn.Conv2d):
            conv = CarryingConv2d if self.residual else nn.Conv2d
            inputs, k = (1 + self.scaled) * (head.in_channels + seen), head.kernel_size[0]
            made = conv(inputs, outputs, k, padding=k // 2, bias=bias)
        else:
            linear = CarryingLinear if self.residual else nn.Linear
            inputs = (1 + self.scaled) * (head.in_features + seen)
            made = linear(inputs, outputs, bias)
        if self.residual:
            for parameter in made.parameters():
                nn.init.zeros_(parameter)
        return made

    def _belief_channels(self, outputs: int) -> int:
        values = outputs // self.likelihood.channels(1)
        return values * (self.likelihood.channels(1) if self.likelihood.discrete else 1)

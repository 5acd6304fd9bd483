"""A network that sees states of an eigenbasis as the data lie: its pixels beside each other."""

from typing import Any

from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.networks.wrapped import WrappedNetwork


class InDataCoordinates(WrappedNetwork):
    """forward = fold(head(features(x, t, y))), turned to the data's coordinates and back.

    The features are the network's own of W x, and the outputs are turned by W^T, with the
    eigenvectors W as columns: the loss, summed over a state, is the same in both coordinates, and
    so is the posterior of the head.

    Args:
        net: of states as the data lie.
        space: of states in an eigenbasis.

    Raises:
        UserError: for another space.

    Example:
        >>> from bayesdiff.data.eigenbasis import Eigenbasis
        >>> from bayesdiff.data.toys import circles
        >>> from bayesdiff.networks import MLP
        >>> space = Eigenbasis(circles(points=100))
        >>> net = InDataCoordinates(MLP(space.shape, width=16), space)
        >>> x, t = torch.randn(5, 2), torch.rand(5)
        >>> turned = net.net.features(x @ net.vectors.T, t)  # what the MLP sees
        >>> torch.equal(net.features(x, t), turned), net(x, t).shape
        (True, torch.Size([5, 2]))
    """

    vectors: Tensor

    def __init__(self, net: Any, space: Any) -> None:
        super().__init__(net)
        basis = getattr(space, "basis", None)
        if basis is None:
            raise UserError(
                "model.wrapper=InDataCoordinates turns states of an eigenbasis, and data.space="
                f"{type(space).__name__} has none; use space=eigenbasis"
            )
        self.head = net.head
        net.head = nn.Identity()
        self.register_buffer("vectors", basis.vectors.float(), persistent=False)

    def features(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Input of the head."""
        return super().features(self._turned(x, self.vectors.T), t, y)

    def fold(self, output: Tensor) -> Tensor:
        """Outputs of the head as states of the eigenbasis."""
        return self._turned(super().fold(output), self.vectors)

    def _turned(self, x: Tensor, matrix: Tensor) -> Tensor:
        return (x.flatten(1) @ matrix.to(x)).reshape(x.shape)

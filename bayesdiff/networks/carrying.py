"""Last layers whose features carry, behind what they read, what is added to their outputs."""

from torch import Tensor, nn


class CarryingConv2d(nn.Conv2d):
    """A convolution that adds the last channels of its features to its outputs."""

    @property
    def carried(self) -> int:
        """Channels that are carried, one for each of the outputs."""
        return self.out_channels

    def forward(self, features: Tensor) -> Tensor:
        """``(B, D + C_out, h, w) -> (B, C_out, h, w)``."""
        read, carried = features.split([self.in_channels, self.carried], -3)
        return super().forward(read) + carried


class CarryingLinear(nn.Linear):
    """A linear layer that adds the last of its features to its outputs."""

    @property
    def carried(self) -> int:
        """Features that are carried, one for each of the outputs."""
        return self.out_features

    def forward(self, features: Tensor) -> Tensor:
        """``(B, ..., D + C_out) -> (B, ..., C_out)``."""
        read, carried = features.split([self.in_features, self.carried], -1)
        return super().forward(read) + carried

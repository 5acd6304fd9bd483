from bayesdiff.networks.adapter import Adapter
from bayesdiff.networks.mlp import MLP
from bayesdiff.networks.network import Network
from bayesdiff.networks.rotated import InDataCoordinates
from bayesdiff.networks.unet import UNet

__all__ = ["MLP", "Adapter", "InDataCoordinates", "Network", "UNet"]

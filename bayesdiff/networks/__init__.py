from bayesdiff.networks.adapter import Adapter
from bayesdiff.networks.network import Network
from bayesdiff.networks.unet import UNet

__all__ = ["Adapter", "Network", "UNet"]

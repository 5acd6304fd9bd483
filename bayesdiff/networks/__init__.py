from bayesdiff.networks.network import Network
from bayesdiff.networks.unet import UNet

__all__ = ["Network", "UNet"]

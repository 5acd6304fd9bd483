from bayesdiff.networks.unet import UNet

__all__ = ["UNet"]

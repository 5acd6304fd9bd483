"""Networks and schedulers that exist already, such as those of diffusers."""

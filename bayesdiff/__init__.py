"""Flow-matching and diffusion models whose every image comes with an uncertainty map."""

__version__ = "0.2.0"

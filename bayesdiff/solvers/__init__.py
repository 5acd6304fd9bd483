from bayesdiff.solvers.diffusion import DDIM, DDPM
from bayesdiff.solvers.flow import Euler, Heun
from bayesdiff.solvers.integrate import Field, SampleNoise, integrate
from bayesdiff.solvers.step import Solver, Step

__all__ = [
    "DDIM",
    "DDPM",
    "Euler",
    "Field",
    "Heun",
    "SampleNoise",
    "Solver",
    "Step",
    "integrate",
]

from bayesdiff.solvers.diffusion import DDIM, DDPM, BayesianUpdate, ProbabilityFlow, SDEEuler
from bayesdiff.solvers.dpm_solver import DPMSolver1, DPMSolver2, DPMSolverPP2M
from bayesdiff.solvers.encode import decode, encode
from bayesdiff.solvers.flow import RK4, Euler, Heun, Midpoint
from bayesdiff.solvers.grid import time_grid
from bayesdiff.solvers.integrate import Field, SampleNoise, integrate
from bayesdiff.solvers.step import Solver, Step, plan

__all__ = [
    "DDIM",
    "DDPM",
    "RK4",
    "BayesianUpdate",
    "DPMSolver1",
    "DPMSolver2",
    "DPMSolverPP2M",
    "Euler",
    "Field",
    "Heun",
    "Midpoint",
    "ProbabilityFlow",
    "SDEEuler",
    "SampleNoise",
    "Solver",
    "Step",
    "decode",
    "encode",
    "integrate",
    "plan",
    "time_grid",
]

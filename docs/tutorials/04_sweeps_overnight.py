"""
Sweeps overnight
================

Many settings, one command: what it will take, what comes out, and how it goes on after it was
stopped. The network is that of the first tutorial, trained once for all runs.
"""

# %%
# The command
# -----------
# ``sweep.py -m`` runs every combination of the values behind commas, each of them one *run*.
# In a terminal this is
#
# .. code-block:: sh
#
#     python sweep.py -m laplace.prior_precision=1,1000,100000 solver=euler,heun ...
#
# Here the same from Python, with the settings of the first tutorial.

import os
import subprocess
import sys
from pathlib import Path

import bayesdiff

settings = [
    "model=flow",
    "data=digits",
    "net.channels=[16,32]",
    "net.patch=2",
    "data.batch_size=64",
    "data.epochs=40",
    "data.ema_decay=0.99",
    "model.optimizer.lr=2e-3",
    "uncertainty=ensemble",
    "uncertainty.num_images=30",
    "metrics.num_images=0",
    "report.pdf=false",
    "callbacks.samples=null",
    "callbacks.progress=null",
    "output_dir=outputs/tutorials",
]
swept = ["solver=euler,heun", "laplace.prior_precision=1,1000,100000"]
script = Path(bayesdiff.__file__).parents[1] / "sweep.py"


def sweep(*words):
    """What the command says, without the dates of its lines."""
    command = [sys.executable, str(script), "-m", *settings, *swept, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    done.check_returncode()
    return done.stdout, done.stderr


# %%
# Before the night: what will it take?
# ------------------------------------
# ``dry_run=true`` writes nothing. It lists the runs, what is there already and what is missing.
# Where earlier runs on this machine were alike, it says how long theirs took.

plan, _ = sweep("dry_run=true")
print(plan)

# %%
# One training serves all six runs, since neither swept key changes what is trained. So does one
# pass over the data, the curvature: all values of ``prior_precision`` share it. Images and maps
# are made for each run. *Made* is what an earlier run or tutorial has left.
#
# The night
# ---------
# The same words without ``dry_run``. Cells run one after the other; ``hydra/launcher=joblib
# hydra.launcher.n_jobs=2`` runs two at once. A run that fails leaves its error in the table and
# does not stop the others.

_, said = sweep()
folder = max(Path("outputs/tutorials/sweeps").glob("*/sweep.csv"), key=os.path.getmtime).parent
print(*sorted(path.name for path in folder.glob("[!.]*")), sep="\n")

# %%
# Reading the table
# -----------------
# ``report.html`` is the page to look at, ``sweep.csv`` the table to compute with: one line for
# each run, with its settings, its metrics and its folder.

import csv

import matplotlib.pyplot as plt

with open(folder / "sweep.csv") as file:
    rows = list(csv.DictReader(file))
columns = {
    "solver": "solver",
    "laplace.prior_precision": "prior_precision",
    "nfe": "evaluations",
    "laplace/effective_parameters": "effective weights",
    "laplace/log_evidence": "log evidence",
    "summed_variance/mean": "mean variance",
}
print(*(f"{title:>17}" for title in columns.values()))
for row in rows:
    values = [row[name] for name in columns]
    print(f"{values[0]:>17}", *(f"{float(value):17.5g}" for value in values[1:]))

figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
for solver, marker in (("euler", "o"), ("heun", "s")):
    of_solver = [row for row in rows if row["solver"] == solver]
    priors = [float(row["laplace.prior_precision"]) for row in of_solver]
    sizes = [float(row["summed_variance/mean"]) ** 0.5 for row in of_solver]
    axes.semilogx(priors, sizes, marker=marker, label=solver)
axes.set(xlabel="prior_precision", ylabel="root of the mean summed variance", ylim=(0, None))
axes.legend(title="solver")
plt.show()

# %%
# - *Evaluations*: of the network for an image with its map. 20 steps of Euler take as many as 10
#   of Heun, which takes two for each.
# - *Effective weights*: how many of the last layer's weights the data determine. A strong prior
#   leaves fewer, and smaller maps.
# - *Log evidence*: which prior the data speak for; higher is better.
#   ``laplace.prior_precision=evidence`` finds the best by itself.
# - The mean of a map's variance, summed over its pixels, is the size of the maps.
#
# All runs use the same noise, so their images can be compared one by one.
#
# Stopped, and started again
# --------------------------
# Whatever stopped it, the same command goes on: what is finished is taken as it is. Here all of it
# is finished, so every run takes a moment.

_, said = sweep()
made = [line.split(" ", 1)[1] for line in said.splitlines() if "made before" in line]
print(*sorted(set(made))[:6], sep="\n")
with open(folder / "sweep.csv") as file:
    again = list(csv.DictReader(file))
same = all(
    row[name] == other[name] for row, other in zip(rows, again, strict=True) for name in columns
)
print("the same table:", same)

# %%
# Seeds
# -----
# One training is one draw. ``seed=0,1,2`` beside the other keys trains three networks, and the
# table gets a second one, ``over_seeds.csv``: the mean of every metric with its 95 % interval over
# the seeds.
#
# .. code-block:: sh
#
#     python sweep.py -m solver=euler,heun seed=0,1,2
#     python sweep.py -m hydra/launcher=joblib hydra.launcher.n_jobs=2 solver=euler,heun seed=0,1,2
#
# Put the key that changes the training last: two workers then begin with different trainings
# instead of waiting for the same one.
#
# What next
# ---------
# - :doc:`/guide/running`: launchers, searches, what counts as trained.
# - :doc:`/concepts/priors`: what the prior does to a map.
# - :doc:`02_is_my_map_right`: which settings make a map right.

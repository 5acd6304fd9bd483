"""What a command does not need it does not import: help is instant, a finished run nearly so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Trained, smallest
from test_cli import with_reader_gone

# Runs a command like the user's, and leaves the names of all modules that it imported.
WATCH = """
import atexit, json, runpy, sys
target, before, sys.argv = sys.argv[1], sys.argv[2].split(), sys.argv[3:]
for name in before:
    __import__(name)
packages = lambda: {name.partition(".")[0] for name in sys.modules}
known = packages()
atexit.register(lambda: json.dump(sorted(packages() - known), open(target, "w")))
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HEAVY = set(
    "torch_fidelity torchvision diffusers transformers matplotlib sklearn scipy laplace "
    "curvlinops tensorboard pandas".split()
)


def imported(tmp_path: Path, before: str, *command: str, read: bool = True) -> set[str]:
    """Packages that the command imports, beside those imported before; whether it is read."""
    target = tmp_path / "modules.json"
    words = ["-c", WATCH, str(target), before, *command]
    if read:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
    else:
        done = with_reader_gone(*words)
    assert done.returncode == 0, done.stderr
    assert read or ("Error" not in done.stderr and "Traceback" not in done.stderr)
    return set(json.loads(target.read_text()))


@pytest.mark.parametrize("script", ["train.py", "sweep.py"])
@pytest.mark.parametrize("what", ["--help", "--cfg=job"])
def test_help_needs_neither_torch_nor_lightning(script, what, tmp_path):
    found = imported(tmp_path, "", script, what)
    assert "hydra" in found
    assert not found & (HEAVY | {"torch", "lightning", "torchmetrics", "numpy", "rich"})


def test_a_finished_run_imports_nothing_heavy_of_its_own_and_needs_no_reader(
    trained: Trained, tmp_path
):
    """Lightning brings much by itself, such as torchmetrics; what it brings is not ours.

    Nobody reads the closing table, which ends quietly.
    """
    again = smallest(trained.output_dir)
    found = imported(tmp_path, "torch lightning hydra", "train.py", *again, read=False)
    # The digits themselves come out of scikit-learn.
    assert found & HEAVY <= {"sklearn"}
    assert {"bayesdiff", "safetensors"} <= found


IMPORTS = """
import sys, bayesdiff.data.sources
heavy = {"torchvision", "sklearn", "matplotlib", "scipy"} & set(sys.modules)
import bayesdiff.metrics.scores, bayesdiff.metrics.agreement
heavy |= {"torch_fidelity", "torchvision", "matplotlib"} & set(sys.modules)
sys.exit(str(heavy) if heavy else 0)
"""


def test_importing_sources_and_scores_is_light():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, cwd=ROOT, timeout=120)


def test_the_watch_can_fail(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("def late():\n    import scipy\nlate()\n")
    assert "scipy" in imported(tmp_path, "", str(script))
    assert "scipy" not in imported(tmp_path, "scipy", str(script))


FORWARD = """
import warnings, torch
from bayesdiff.networks.forward_mode import jvp
warnings.simplefilter("error")  # torch loads a part of itself at the first derivative
with torch.inference_mode():
    jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))
"""


def test_the_first_forward_derivative_warns_of_nothing():
    subprocess.run([sys.executable, "-c", FORWARD], check=True, cwd=ROOT, timeout=120)

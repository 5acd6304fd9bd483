"""Of two processes that need the same artefact, one makes it and one waits."""

import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, smallest

from bayesdiff.checks import UserError
from bayesdiff.storage import locks

HOLD = """
import sys
from pathlib import Path
from bayesdiff.storage.locks import alone
with alone(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
    Path(sys.argv[1]).write_text("made")
"""

# What is made, counted over all processes by one line each.
RUN = """
import sys
sys.path.insert(0, "tests")
from conftest import QUICK_CLASSIFIER, compose_list
from bayesdiff import pipeline
from bayesdiff.runs import scores as run_scores, training
from bayesdiff.laplace import callback
from bayesdiff.metrics import classifier, scores
from bayesdiff.report import board
from bayesdiff.storage import artefacts

def counted(module, name, what):
    make = getattr(module, name)
    def counting(*args, **kwargs):
        label = what(*args) if callable(what) else what
        with open(sys.argv[1], "a") as file:
            file.write(label + "\\n")
        return make(*args, **kwargs)
    setattr(module, name, counting)

counted(training, "train", "training")
counted(callback, "fit_curvature", "curvature")
counted(artefacts, "write_arrays", lambda path, *_: path.name.split("-")[0])
counted(classifier, "train_classifier", "classifier")
counted(scores, "_reference", "reference")
counted(run_scores.FeatureScores, "__call__", "score")
counted(board, "write", "pictures")
classifier._epochs = QUICK_CLASSIFIER[1]
pipeline.run(compose_list(sys.argv[2:]))
"""

TOGETHER = """
import sys
from pathlib import Path
import torch.distributed as dist
from bayesdiff.storage import locks
locks._PATIENCE = 0.1
rank, place = int(sys.argv[2]), Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{place}-meet", rank=rank, world_size=2)
print("here", flush=True)
with locks.together(place), locks.together(place):  # free inside itself
    there = place.read_text()
    dist.barrier()
print(there, flush=True)
dist.destroy_process_group()
"""


def python(code: str, *arguments: object, **pipes: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE} | pipes
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)


@pytest.fixture
def owner(tmp_path: Path):
    """A process that holds the lock on ``artefact`` until it reads a line."""
    process = python(HOLD, tmp_path / "artefact")
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_owner_leaves_the_lock_to_the_next(owner, tmp_path):
    lock = locks.lock_of(tmp_path / "artefact")
    assert not locks.taken(lock, 0)
    assert locks.holder(lock).startswith(f"process {owner.pid} on ")
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with locks.alone(tmp_path / "artefact"):
        assert not locks.taken(locks.lock_of(tmp_path / "artefact"), 0)
    assert not (tmp_path / "artefact").exists()


def test_a_waiting_process_says_for_whom_and_finds_the_artefact(owner, tmp_path, caplog):
    caplog.set_level(logging.INFO, "bayesdiff.storage.locks")

    def release():
        while not caplog.messages:
            time.sleep(0.01)
        owner.communicate("\n")

    thread = threading.Thread(target=release)
    thread.start()
    with locks.alone(tmp_path / "artefact"):
        assert (tmp_path / "artefact").read_text() == "made"
    thread.join()
    first, second = caplog.messages
    assert f"which process {owner.pid} on " in first and "artefact" in first
    assert "over" in second


def test_a_lock_is_free_inside_itself_and_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), locks.alone(tmp_path / "a"), locks.alone(tmp_path / "a"):
        raise RuntimeError
    assert locks._held == set()
    with locks.together(tmp_path / "a"):
        assert not locks.taken(locks.lock_of(tmp_path / "a"), 0)


def test_a_folder_that_cannot_hold_a_lock_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, NotADirectoryError)), locks.alone(tmp_path / "file" / "a"):
        pass


def test_two_processes_of_a_run_wait_together(owner, tmp_path):
    """The second one holds no lock and is not lost in a collective while the first one waits."""
    ranks = [python(TOGETHER, tmp_path / "artefact", rank) for rank in range(2)]
    assert [process.stdout.readline() for process in ranks] == ["here\n"] * 2
    owner.communicate("\n")
    assert [process.communicate(timeout=60)[0] for process in ranks] == ["made\n"] * 2


@pytest.mark.slow
def test_two_processes_at_once_make_everything_once(tmp_path):
    overrides = smallest(tmp_path, "uncertainty.validate=false")
    both = [python(RUN, tmp_path / "log", *overrides, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    made = Counter((tmp_path / "log").read_text().split())
    once = "training curvature images samples image classifier reference score pictures".split()
    assert made == Counter(once)

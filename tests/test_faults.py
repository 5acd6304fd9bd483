"""Whatever stops a run, the same command ends it as if nothing had happened, or says one line."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUICK_CLASSIFIER, ROOT, compose_list, smallest
from test_sources import pixels, write_png

from bayesdiff import pipeline
from bayesdiff.cli import known, one_line_errors
from bayesdiff.machine import ranks as distributed
from bayesdiff.report import board
from bayesdiff.storage.atomic import write_atomic

# Every kind of file that a run leaves, refiner and blocks of a pool included.
EVERYTHING = (
    "uncertainty=refined",
    "uncertainty.validate=true",
    "uncertainty.validate_images=3",
    "uncertainty.validate_members=2",
    "callbacks=snapshots",
    "callbacks.progress=null",
    "callbacks.samples=null",
    "callbacks.snapshots.keep=2",
    "trainer.max_epochs=2",
    "experiment=filtering",
    "filtering.num_images=20",
    "filtering.seeds=[0]",
    "filtering.keep=[0.5]",
    "filtering.main_keep=0.5",
    "filtering.members=2",
    "filtering.aleatoric_draws=0",
    "filtering.subsets=3",
    "filtering.draws=2",
    "filtering.rules=[]",
    "~filtering.maps.published",
)


def said(action: Callable[[], object]) -> str:
    """What a user would see of an action that fails."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        action()
    line = str(stop.value.code)
    assert "\n" not in line and len(line) < 600, line
    return line


def contents(folder: Path) -> dict[str, object]:
    """All that a run found, without its times and its pictures."""
    found: dict[str, object] = {}
    for path in (p for p in folder.rglob("*") if p.is_file() and p.parent.name != ".locks"):
        name = str(path.relative_to(folder))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                found |= {f"{name}/{part}": file[part].tobytes() for part in file.files}
        elif path.name.startswith(("metrics", "results", "validation")) and path.suffix == ".json":
            found[name] = json.loads(path.read_text())
    return found


def left_over(folder: Path) -> list[str]:
    """Files that were only begun."""
    begun = (p.name for p in folder.rglob("*") if p.is_file() and p.parent.name != ".locks")
    return [name for name in begun if name.startswith(".") and name != ".writable"]


def everything(output_dir: Path, *more: str) -> None:
    pipeline.run(compose_list(smallest(output_dir, *EVERYTHING, *more)))


@pytest.fixture(autouse=True)
def quick(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are most of the time, and are not what is looked at here."""
    monkeypatch.setattr(*QUICK_CLASSIFIER)
    monkeypatch.setattr(board, "write", lambda *args, **kwargs: [])
    monkeypatch.setattr(board, "write_study", lambda *args, **kwargs: [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nothing stopped, with files of every kind."""
    output_dir = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*QUICK_CLASSIFIER)
        patch.setattr(board, "write", lambda *args, **kwargs: [])
        patch.setattr(board, "write_study", lambda *args, **kwargs: [])
        everything(output_dir)
    torch.set_num_threads(threads)
    return output_dir


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(whole, tmp_path, dirs_exist_ok=True)


def no_space(path: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def power_off(path: object) -> None:
    raise KeyboardInterrupt


def attempts(output_dir: Path, patch: pytest.MonkeyPatch, fault: Callable, late: bool) -> list:
    """Start the run until it gets through, while the first write of every file goes wrong.

    Returns:
        The files, in their order, each with what the user was told of it.
    """
    real, met, told = os.replace, [], []

    def replace(source: str, target: Path) -> None:
        if late:
            real(source, target)
        if str(target) not in met:
            met.append(str(target))
            fault(target)
        if not late:
            real(source, target)

    patch.setattr(os, "replace", replace)
    for _ in range(60):
        before = len(met)
        try:
            with one_line_errors():
                everything(output_dir)
        except SystemExit as stop:
            assert len(met) == before + 1
            told.append((Path(met[-1]), str(stop.code)))
            assert left_over(output_dir) == []
            continue
        return told
    raise AssertionError("the run never ends")


def test_stopped_after_every_write_it_ends_the_same(whole, tmp_path, monkeypatch):
    told = attempts(tmp_path, monkeypatch, power_off, late=True)
    assert len(told) >= 20 and all("interrupted" in line for _, line in told)
    assert contents(tmp_path) == contents(whole)


def test_a_disk_that_is_full_at_every_write(whole, tmp_path, monkeypatch):
    told = attempts(tmp_path, monkeypatch, no_space, late=False)
    for path, line in told:
        assert line.startswith("error: ") and "\n" not in line
        assert str(path) in line and "the disk is full; free some space" in line
    kinds = {re.sub(r"-.*|\..*", "", path.name) for path, _ in told}
    assert kinds >= {
        *("last", "epoch", "curvature", "fit", "images", "refiner", "samples", "validation"),
        *("classifier", "reference", "scores", "metrics", "refined", "results", "table"),
    }
    assert contents(tmp_path) == contents(whole)


# Where they are below the run, and what is said of those that are not simply made again.
FILES = {
    "checkpoints/last.ckpt": "(truncated or corrupt|is no checkpoint).*(delete|instead)",
    "curvature-*.safetensors": "(cannot be read|is damaged).*delete it",
    "snapshots/epoch-00002.safetensors": None,
    "fit.json": None,
    "images-*.npz": None,
    "scores-*.json": None,
    "refiner-*.safetensors": None,
    "samples-*.npz": None,
    "validation-*.json": None,
    "*/metrics.json": None,
    "pools/members-*.npz": None,
    "pools/refined-*.npz": None,
    "*/results.json": None,
    "../cache/classifier-*.safetensors": None,
    "../cache/reference-*.npz": None,
}


def damaged(path: Path, how: str) -> bytes:
    content = path.read_bytes()
    half = len(content) // 2
    if how == "flipped" and path.suffix == ".json":
        return b""
    if how == "flipped":  # what has a checksum notices a single byte
        checked = path.suffix in (".npz", ".safetensors")
        other = bytes([content[half] ^ 255])
        return content[:half] + other + content[half + 1 :] if checked else content
    return content[:half] if how == "half" else bytes(len(content))


@pytest.mark.parametrize("how", ["half", "zeros", "flipped"])
def test_a_damaged_file_is_made_again_or_refused(how, whole, copy):
    """All of them at once: what is refused is deleted, as the line says, and made again."""
    (run,) = copy.glob("digits-flow-*")
    for pattern, line in FILES.items():
        for path in run.glob(pattern):
            before = path.read_bytes()
            path.write_bytes(damaged(path, how))
            if line is not None and path.read_bytes() != before:
                answer = said(lambda: everything(copy))
                assert str(path) in answer and re.search(line, answer), answer
                path.unlink()
    everything(copy)
    assert contents(copy) == contents(whole)


def test_a_data_file_that_vanished_between_runs(tmp_path):
    for number in range(180):
        write_png(tmp_path / "images" / "ab"[number % 2] / f"{number}.png", pixels(number, (8, 8)))
    options = ["data=folder", f"data.root={tmp_path}/images", "metrics.num_images=0"]
    cfg = compose_list(smallest(tmp_path / "out", *options))
    folder = pipeline.run(cfg).folder.parent
    (tmp_path / "images" / "a" / "0.png").write_bytes(b"")
    assert (
        "a/0.png" in (line := said(lambda: pipeline.run(cfg))) and "replace or remove it" in line
    )
    (tmp_path / "images" / "a" / "0.png").unlink()
    other = pipeline.run(cfg).folder.parent
    assert other != folder  # other data is another run, and the finished one is kept
    shutil.rmtree(tmp_path / "images")
    assert "images does not exist" in said(lambda: pipeline.run(cfg))
    assert (folder / "fit.json").is_file() and (other / "fit.json").is_file()


def test_a_disk_that_writers_of_other_languages_find_full(tmp_path):
    """C++ and Rust tell it in their own words, around or without Python's error."""
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("unexpected pos 704 vs 598")
    wrapped.__context__ = full
    rust = RuntimeError("I/O error: No space left on device (os error 28)")
    for error in (full, wrapped, rust):

        def write(file: Path, error: Exception = error) -> None:
            file.write_text("half")
            raise error

        (tmp_path / "kept.txt").write_text("old")
        line = said(lambda: write_atomic(tmp_path / "kept.txt", write))
        assert f"cannot write to {tmp_path}/kept.txt: the disk is full" in line
        assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
        assert (tmp_path / "kept.txt").read_text() == "old"
    denied = PermissionError(errno.EACCES, "Permission denied", "/x/y")
    assert known(denied) == "cannot write to /x/y: Permission denied; choose another output_dir"
    assert known(RuntimeError("unexpected pos 704 vs 598")) is None
    assert known(FileNotFoundError(errno.ENOENT, "No such file", "/x")) is None


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    script = (
        "import os, sys; from pathlib import Path\n"
        "from bayesdiff.storage.atomic import write_atomic\n"
        "write_atomic(Path(sys.argv[1]), lambda file: os.kill(os.getpid(), 9))"
    )
    target, other = tmp_path / "a.npz", tmp_path / "a-b.npz"
    for path in (target, other):
        done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT)
        assert done.returncode == -9
    assert len(left_over(tmp_path)) == 2
    alive = tmp_path / left_over(tmp_path)[0].replace("-", f"-{'0' * 8}-", 1)
    alive.touch()  # another machine's, for all that is known here
    write_atomic(target, lambda file: file.write_text("whole"))
    left = left_over(tmp_path)
    assert len(left) == 2 and alive.name in left and any("a-b" in name for name in left)


def start(output_dir: Path, *overrides: str, trainer: str = "ddp") -> tuple[subprocess.Popen, int]:
    """A training of two processes that would go on for hours, and the second one's number."""
    chosen = [o for o in smallest(output_dir) if "max_epochs" not in o]
    log = (output_dir / "log").open("w")
    command = [sys.executable, "train.py", *chosen, f"trainer={trainer}", "trainer.devices=2"]
    command += ["trainer.accelerator=cpu", "trainer.max_epochs=100000", *overrides]
    inherited = {k: v for k, v in os.environ.items() if not re.search("RANK|WORLD_|^PL_|HYDRA", k)}
    env = inherited | {"OMP_NUM_THREADS": "1"}
    main = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
    for _ in range(600):
        if list(output_dir.glob("*/checkpoints/last.ckpt")) or main.poll() is not None:
            break
        time.sleep(0.2)
    children = Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split()
    return main, int(children[0])


def ends(main: subprocess.Popen, other: int, output_dir: Path, seconds: float) -> str:
    """What was said when both processes ended, within the time."""
    try:
        main.wait(seconds)
        limit = time.monotonic() + seconds
        while Path(f"/proc/{other}").exists():
            assert time.monotonic() < limit, "a process is left"
            time.sleep(0.1)
    finally:
        for number in {main.pid} if main.poll() is None else set():
            os.kill(number, signal.SIGKILL)
    return (output_dir / "log").read_text()


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds processes in /proc, which only Linux has"
)


@needs_proc
def test_a_run_outlives_the_shell_that_started_it(monkeypatch):
    ended = []
    monkeypatch.setattr(distributed.os, "_exit", ended.append)
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(distributed.os, "getppid", lambda: 1)  # the shell is gone
    states = iter([None, None, 0])
    distributed._watch([SimpleNamespace(poll=lambda: next(states))], parent=4321)
    assert not ended
    distributed._watch([], parent=4321)  # a process that was started follows the first one
    assert ended == [1]


def test_a_process_that_dies_ends_the_others_with_a_word(tmp_path):
    main, other = start(tmp_path)
    os.kill(other, signal.SIGKILL)
    told = ends(main, other, tmp_path, 30)
    assert main.returncode == 1
    assert told.count("another process of this run ended") == 1 and "Traceback" not in told


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("which", ["first killed", "second stands still"])
def test_the_others_end_too(which, tmp_path):
    # Long enough for two processes to find each other on a busy machine.
    main, other = start(tmp_path, "process_timeout=60")
    if which == "first killed":
        os.kill(main.pid, signal.SIGKILL)
    else:
        os.kill(other, signal.SIGSTOP)
    told = ends(main, other, tmp_path, 300)
    assert main.returncode == (-9 if which == "first killed" else 1)
    assert "another process of this run ended, or kept this one waiting" in told
    assert "Traceback" not in told


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_a_training_that_is_told_to_end_does(trainer, tmp_path):
    """As SLURM, systemd and timeout do."""
    main, other = start(tmp_path, trainer=trainer)
    main.terminate()
    told = ends(main, other, tmp_path, 60)
    assert main.returncode not in (0, None) and "the same command continues" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_random(tmp_path):
    script = ROOT / "experiments" / "sweep-demo" / "kills.py"
    results = tmp_path / "results.json"
    command = [sys.executable, str(script), "--smoke", "--kills=2", f"--results={results}"]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads(results.read_text())
    assert found["kills_survived"] == 2 and found["repeated_stages"] == 0

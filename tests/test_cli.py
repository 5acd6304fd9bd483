"""Standard output whose reader leaves early ends a command quietly, not in a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from bayesdiff.cli import closed_pipe


def with_reader_gone(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose standard output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, *command],
            stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    finally:
        os.close(writer)


@pytest.mark.parametrize("what", ["--help", "--cfg=job"])
@pytest.mark.parametrize("full", ["0", "1"])
def test_help_whose_reader_is_gone_ends_quietly(what: str, full: str, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", full)
    done = with_reader_gone("train.py", what)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_broken_pipe_stays_an_error():
    with pytest.raises(BrokenPipeError), closed_pipe():
        raise BrokenPipeError


def test_another_broken_pipe_is_an_error_whoever_reads_standard_output():
    """A worker that is gone is no success, because ``head`` has seen enough."""
    code = (
        "import bayesdiff.cli as c\nwith c.closed_pipe():\n    raise BrokenPipeError('a worker')"
    )
    done = with_reader_gone("-c", code)
    assert done.returncode == 1 and "BrokenPipeError: a worker" in done.stderr
    code = "import bayesdiff.cli as c\nwith c.closed_pipe():\n    print('a' * 99999, flush=True)"
    done = with_reader_gone("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_threads_that_wait_sleep_unless_the_user_says_otherwise(tmp_path: Path):
    code = "import os, bayesdiff.cli; print(os.environ['OMP_WAIT_POLICY'])"
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    for given, policy in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=inherited | given, cwd=ROOT,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == policy

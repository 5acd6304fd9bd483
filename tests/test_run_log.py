"""run.log has all that was said, of this run alone, and leaves nothing open."""

import logging
import re
import warnings
from pathlib import Path

import pytest
from conftest import Trained

from bayesdiff.checks import UserError
from bayesdiff.runs import run_log
from bayesdiff.runs.run_log import recording, write_to

log = logging.getLogger("bayesdiff.somewhere")
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.fixture(autouse=True)
def informed(caplog):
    caplog.set_level(logging.INFO)


def lines(folder: Path) -> list[str]:
    """Levels and messages."""
    text = (folder / "run.log").read_text()
    found = re.findall(rf"^{STAMP}(\w+) \[\d+\] (.*)$", text, re.MULTILINE)
    return [" ".join(line) for line in found]


def test_lines_before_the_folder_is_known_are_kept(tmp_path: Path):
    with recording("seed=1"):
        log.info("early %d", 1)
        write_to(tmp_path / "run")
        log.warning("late")
        assert lines(tmp_path / "run")[-1] == "WARNING late"  # at once, not at the end
    assert lines(tmp_path / "run") == [
        "INFO begun: seed=1",
        "INFO early 1",
        "WARNING late",
        "INFO done",
    ]


def test_where_nobody_has_set_up_logging_all_is_kept_and_warnings_are_seen(
    tmp_path: Path, monkeypatch, capsys
):
    """As in a script or a notebook: Python itself would show warnings alone."""
    root, ours = logging.getLogger(), logging.getLogger("bayesdiff")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    ours.manager._clear_cache()  # of what is enabled
    with recording():
        write_to(tmp_path)
        log.info("a stage")
        log.warning("a doubt")
    assert lines(tmp_path)[1:3] == ["INFO a stage", "WARNING a doubt"]
    assert capsys.readouterr().err == "a doubt\n"
    assert root.handlers == [] and ours.level == logging.NOTSET


def test_a_second_run_appends_and_a_run_without_a_folder_leaves_none(tmp_path: Path):
    for number in range(2):
        with recording():
            write_to(tmp_path)
            log.info("run %d", number)
    with recording():
        log.info("refused before it had a folder")
    assert [line for line in lines(tmp_path) if "run " in line] == ["INFO run 0", "INFO run 1"]
    log.info("after it")
    assert "after it" not in (tmp_path / "run.log").read_text()


def test_cells_of_one_process_have_their_own_lines_and_share_no_handle(tmp_path: Path):
    before, hook = list(logging.getLogger().handlers), warnings.showwarning
    for name in ("a", "b"):
        with recording(name), recording("inside"):
            write_to(tmp_path / name)
            log.info("of %s", name)
    for name in ("a", "b"):
        assert lines(tmp_path / name) == [f"INFO begun: {name}", f"INFO of {name}", "INFO done"]
    assert logging.getLogger().handlers == before and warnings.showwarning is hook


def test_warnings_and_the_last_line_of_a_failure_are_there(tmp_path: Path):
    with pytest.warns(RuntimeWarning), pytest.raises(UserError), recording():
        write_to(tmp_path)
        warnings.warn("look out", RuntimeWarning, stacklevel=1)
        raise UserError("data.root=x is not there; correct it")
    found = lines(tmp_path)
    assert re.fullmatch(r"WARNING .*test_run_log.py:\d+: RuntimeWarning: look out", found[1])
    assert found[2] == "ERROR error: data.root=x is not there; correct it"


def test_a_fault_has_its_place_and_ctrl_c_its_word(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), recording():
        write_to(tmp_path)
        print(1 / 0)
    text = (tmp_path / "run.log").read_text()
    assert "Traceback" in text and text.endswith("ZeroDivisionError: division by zero\n")
    with pytest.raises(KeyboardInterrupt), recording():
        write_to(tmp_path)
        raise KeyboardInterrupt
    assert lines(tmp_path)[-1] == "ERROR interrupted"


def test_a_full_disk_stops_no_run(tmp_path: Path):
    with recording():
        run_log._now.path = tmp_path / "nowhere" / "run.log"
        log.info("lost")


def test_a_finished_run_has_one(trained: Trained):
    text = (trained.folder / run_log.NAME).read_text()
    assert "begun:" in text and text.rstrip().endswith("done")

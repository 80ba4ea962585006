"""Writing files: whole or not at all, through links, to devices and pipes, and what the system refuses."""

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coop.cli import main
from coop.errors import CoopError, explanation
from coop.io import STALE_SECONDS, atomic_write, check_writable, track, write_text


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "first")
    with pytest.raises(ValueError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert path.read_text() == "first" and os.listdir(path.parent) == ["file.txt"]


def test_permissions_are_the_umask_s_whoever_writes(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "tensors") as temporary:
            save_file({"a": np.zeros(2)}, temporary)  # makes a file of its own, for its owner alone
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "tensors").stat().st_mode) == 0o640
    assert load_file(tmp_path / "tensors")["a"].tolist() == [0, 0]


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "file")
    write_text(link, "new")
    assert link.is_symlink() and (tmp_path / "there" / "file").read_text() == "new"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "there" / "later")
    write_text(dangling, "made")
    assert dangling.is_symlink() and (tmp_path / "there" / "later").read_text() == "made"


def test_a_symbolic_link_to_itself_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(link)
    for write in (check_writable, lambda path: atomic_write(path).__enter__()):
        with pytest.raises(OSError) as refused:
            write(link)
        assert refused.value.errno == errno.ELOOP
    assert link.is_symlink() and not list(tmp_path.glob(".*"))


def test_devices_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through the pipe")
    reader.join(timeout=30)
    assert received == ["through the pipe"] and stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(CoopError, match="folder"):
        write_text(tmp_path, "text")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_device_is_the_system_s_refusal() -> None:
    with pytest.raises(OSError) as caught:
        write_text(Path("/dev/full"), "text")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_library_s_full_disk_is_an_os_error(tmp_path: Path) -> None:
    """As safetensors words it; a disk cannot be filled here."""
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "file"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_what_killed_writers_left_goes_after_an_hour(tmp_path: Path) -> None:
    old, fresh, other = (tmp_path / name for name in (".f.0a1b2c3d.tmp", ".f.1a1b2c3d.tmp", ".g.0a1b2c3d.tmp"))
    for path in (old, fresh, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - STALE_SECONDS - 60,) * 2)
    write_text(tmp_path / "f", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"f", fresh.name, other.name}


def test_what_a_killed_writer_left_on_this_machine_goes_at_once(tmp_path: Path) -> None:
    code = "import sys, os; from pathlib import Path; from coop.io import atomic_write\n"
    code += "with atomic_write(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], check=False)
    (left,) = tmp_path.iterdir()
    with atomic_write(tmp_path / "f") as ours:  # of a process that lives: it stays
        write_text(tmp_path / "f", "whole")
        assert ours.exists() and not left.exists()


def test_without_a_terminal_progress_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("coop.io.PROGRESS_SECONDS", 0.05)
    for _ in track(range(3), "encoding", 3):
        time.sleep(0.06)
    assert "encoding: 1 of 3" in capsys.readouterr().err


def test_refusals_of_the_system_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, not 2; --debug, before or after the command, shows the traceback."""
    (tmp_path / "file").write_text("")
    words = ["run", "dataset=fashion_mnist", "method=zero_shot", f"results={tmp_path / 'file' / 'results'}"]
    for command, shown in ((words, False), (["--debug", *words], True), ([*words, "--debug"], True)):
        assert main(command) == 1
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith("coop: ") and str(tmp_path / "file") in err
        assert ("Traceback" in err) is shown and (shown or len(err.splitlines()) == 1)


@pytest.mark.parametrize("place", ["", "folder", "file/x", "folder/file/x/y", "x" * 300])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run does not exist either, but is not even looked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for path in ("file", "folder/file"):
        (tmp_path / path).write_text("mine")
    sample = ["data", "sample", "dtd", "--shots", "1"]
    for words in (["table", "none"], ["words", "none"], ["predict", "none", "none"], ["export", "none"], sample):
        assert main([*words, "--output", place]) == (2 if place in ("", "folder") else 1), words
        err = capsys.readouterr().err
        assert "none" not in err and "dtd" not in err and len(err.splitlines()) == 1
    for place, code in (("", 2), ("file", 2), ("file/x", 1), ("x" * 300, 1)):
        assert main(["report", "none", "--output", place]) == code
        assert "none" not in capsys.readouterr().err


def test_what_a_command_says_of_an_error(tmp_path: Path) -> None:
    """A mistake is 2, what the system refuses 1, also where it was met while a user's file was read."""
    for number, code in ((errno.ENOENT, 2), (errno.EACCES, 1), (errno.ENOSPC, 1)):
        try:
            raise CoopError("cannot read it") from OSError(number, os.strerror(number), "file")
        except CoopError as error:
            assert explanation(error) == (code, "cannot read it")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError) as caught:
        (tmp_path / "link").mkdir(exist_ok=True)
    assert explanation(caught.value)[0] == 1 and "a link that leads nowhere" in explanation(caught.value)[1]
    assert explanation(OSError(errno.ENOSPC, "No space left on device", "x")) == (1, "No space left on device: x")
    allocation = RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 8 bytes")
    assert explanation(allocation) == (1, "there is not enough memory") == explanation(MemoryError())
    assert explanation(ZeroDivisionError("our own")) == (1, "")


@pytest.mark.parametrize("device", ["/dev/zero", "pipe"])
def test_what_has_no_end_is_not_read(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    place = str(tmp_path / device)  # an absolute one stays
    (tmp_path / "prompts.json").write_text("{}")
    for words in (
        ["data", "sample", "dtd", "--shots", "1", "--split-file", place],
        ["import", place, "--architecture", "lit_lite", "--output", str(tmp_path / "x")],
        ["predict", place, "a.jpg"],
        ["predict", str(tmp_path), "a.jpg", "--classes", place],
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "a device or a pipe" in err and len(err.splitlines()) == 1


def test_standard_output_that_is_a_pipe(tmp_path: Path) -> None:
    code = "from pathlib import Path; from coop.io import write_text; write_text(Path('/dev/stdout'), 'text')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "text"


def test_a_closed_standard_output_is_no_error() -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m coop.cli run --help-keys >&-"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_data_root_is_read_as_in_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COOP_DATA", "~nosuchuser/data")
    assert main(["data", "list"]) == 2
    assert "~nosuchuser" in capsys.readouterr().err
    monkeypatch.setenv("COOP_DATA", "~/no-data-here")
    assert main(["data", "list"]) == 0
    assert str(Path.home() / "no-data-here") in capsys.readouterr().out


def test_results_that_are_no_folder_are_not_taken_for_missing_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    for name in ("link", "file"):
        assert main(["study", "demo", "--status", f"results={tmp_path / name}"]) == 2
        assert str(tmp_path / name) in capsys.readouterr().err

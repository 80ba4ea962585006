"""Several processes at one sweep - of a launcher, or started by hand - do every run once, and get the same results."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from coop.cli import main
from coop.options import flat
from coop.runs.store import FAILURE, RESULT
from coop.runs.workers import ATTEMPT, RunLocks, Share
from tests.small_place import make_place, words_for

ROOT = Path(__file__).resolve().parents[1]
HERE = ["hydra/launcher=local_gpus", "jobs=2"]
GRID = ["shots=1,2", "seed=1,2", "n_ctx=2,3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def alone(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the grid's results and features as one process makes them."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COOP_CACHE", str(folder / "cache"))
        assert main(["run", "-m", *words_for(place, folder / "results"), *GRID]) == 0
    return folder


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test an empty cache, and its processes the code that is tested."""
    monkeypatch.setenv("COOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def found(results: Path) -> dict[str, dict[str, Any]]:
    """Return what was found by all runs under a folder; floats depend on which images were encoded together."""
    read = {str(path.parent.relative_to(results)): json.loads(path.read_text()) for path in results.rglob(RESULT)}
    kept = ("key", "targets", "fit", "weights")
    return {name: flat({key: result[key] for key in kept}) for name, result in read.items()}


def done_in(text: str) -> Counter[str]:
    """Count how often each run was done, by what processes say of it: [1/8] name  33.33 %."""
    return Counter(re.findall(r"^\[\d+/\d+\] (\S+)  \d", text, flags=re.MULTILINE))


def features(cache: Path) -> dict[bytes, list[torch.Tensor]]:
    """Return the rows of a cache by their keys, each with all that were computed of it."""
    rows: dict[bytes, list[torch.Tensor]] = {}
    for path in cache.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key, row in zip(file.get_tensor("keys").numpy(), file.get_tensor("features"), strict=True):
                rows.setdefault(bytes(key), []).append(row)
    return rows


def check_equal(folder: Path, alone: Path) -> None:
    """Compare results and features with those of one process; nothing is half, nothing left over."""
    results, expected = found(folder / "results"), found(alone / "results")
    assert results.keys() == expected.keys()
    for name, result in results.items():
        for key, value in result.items():
            other = expected[name][key]
            assert value == (pytest.approx(other, rel=1e-4, abs=1e-6) if isinstance(other, float) else other), key
    ours, theirs = features(folder / "cache"), features(alone / "cache")
    assert ours.keys() == theirs.keys()
    for key, rows in ours.items():
        assert len(rows) == 1, "encoded twice"
        torch.testing.assert_close(rows[0], theirs[key][0], rtol=1e-4, atol=1e-5)
    runs = [path.parent for path in (folder / "results").rglob(RESULT)]
    names = {"config.yaml", "sample.json", "learned.safetensors", "predictions.safetensors", RESULT}
    assert all({path.name for path in run.iterdir()} == names for run in runs)


def start(words: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "coop.cli", "run", "-m", *words]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def stop_within_a_run(results: Path) -> tuple[Path, int]:
    """Stop a process in the middle of a run; return the run's folder and the process's number."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for path in results.rglob(ATTEMPT):
            try:
                pid = int(path.read_text().split()[2])
                os.kill(pid, signal.SIGSTOP)
            except (OSError, IndexError):
                continue
            if path.exists() and not (path.parent / RESULT).exists():
                return path.parent, pid
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.001)
    raise AssertionError("no run was begun")


@pytest.mark.slow
def test_processes_of_a_launcher_share_the_sweep(
    place: Path, alone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each run is done once, by the one or the other; what fails is recorded, and stops nothing."""
    words = words_for(place, tmp_path / "results")
    assert main(["run", "-m", *words, "shots=1,2", "seed=1,2", "n_ctx=2,3,40", *HERE]) == 1
    out = capfd.readouterr().out
    assert "12 runs: 0 done already, 12 to do" in out and "8 done, 4 failed" in out
    logs = [path.read_text() for path in (tmp_path / "results" / ".sweep").rglob("*.out")]
    assert len(logs) == 2
    done = done_in("".join(logs))
    assert len(done) == 8 and set(done.values()) == {1} and "".join(logs).count("failed:") == 4
    failures = list((tmp_path / "results").rglob(FAILURE))
    assert len(failures) == 4 and all("24" in json.loads(path.read_text())["error"] for path in failures)
    check_equal(tmp_path, alone)


@pytest.mark.slow
def test_a_killed_process_of_a_launcher_is_told_and_its_run_done_next_time(
    place: Path, alone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*words_for(place, tmp_path / "results"), *GRID]
    killed: list[Path] = []

    def kill_one() -> None:
        folder, pid = stop_within_a_run(tmp_path / "results")
        killed.append(folder)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert main(["run", "-m", *words, *HERE]) == 1
    killer.join()
    out = capfd.readouterr().out
    assert "ended early" in out and "7 done, 0 failed, 1 interrupted" in out
    assert not (killed[0] / RESULT).exists() and len(found(tmp_path / "results")) == 7
    assert main(["run", "-m", *words]) == 0
    assert "7 done already, 1 to do" in capfd.readouterr().out
    check_equal(tmp_path, alone)


@pytest.mark.slow
def test_processes_started_by_hand_share_the_sweep(place: Path, alone: Path, tmp_path: Path) -> None:
    """All return when everything is done."""
    processes = [start([*words_for(place, tmp_path / "results"), *GRID]) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    done = done_in("".join(said))
    assert len(done) == 8 and set(done.values()) == {1}
    assert all("8 done, 0 failed" in text for text in said)
    check_equal(tmp_path, alone)


@pytest.mark.slow
def test_what_a_killed_process_held_is_free(place: Path, alone: Path, tmp_path: Path) -> None:
    """The other does everything else, waits while the first may live, and takes its run over when it is dead."""
    words = [*words_for(place, tmp_path / "results"), *GRID]
    first = start(words)
    folder, pid = stop_within_a_run(tmp_path / "results")
    assert pid == first.pid
    second = start(words)
    try:
        assert second.stdout is not None
        said = ""
        while "waiting for other processes, which are at 1 of these runs" not in said:
            line = second.stdout.readline()
            assert line, said
            said += line
        assert second.poll() is None and not (folder / RESULT).exists()
    finally:
        first.kill()
    said += second.communicate(timeout=120)[0]
    first.communicate()
    assert second.returncode == 0 and "8 done, 0 failed" in said and set(done_in(said).values()) == {1}
    assert done_in(said)[str(folder.relative_to(tmp_path / "results"))[:-9]] == 1
    check_equal(tmp_path, alone)


SBATCH = """#!/bin/bash
cp "$1" "$SLURM_RECORD"
last=$(sed -n "s/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p" "$SLURM_RECORD")
for i in $(seq 0 "$last"); do
  SLURM_JOB_ID=$((100 + i)) SLURM_ARRAY_JOB_ID=100 SLURM_ARRAY_TASK_ID=$i SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 \\
  SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 bash "$SLURM_RECORD" >"$SLURM_RECORD.$i" 2>&1 </dev/null &
done
echo "Submitted batch job 100"
"""
SRUN = '#!/bin/bash\n[ "$1" = --unbuffered ] && [ "$2" = --output ] && shift 3 && exec "$@"\n'
SACCT = '#!/bin/bash\necho "JobID|State|NodeList"\n'


@pytest.mark.slow
def test_slurm_is_asked_for_jobs_of_one_gpu(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stand-ins for Slurm's commands record what they are given, and start it on this machine."""
    for name, script in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_RECORD", str(tmp_path / "script"))
    settings = ["hydra/launcher=slurm", "jobs=2", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=30"]
    assert main(["run", "-m", *words_for(place, tmp_path / "results"), "shots=1", "seed=1,2", *settings]) == 0
    assert "2 done, 0 failed" in capfd.readouterr().out
    asked = set(re.findall(r"^#SBATCH --(\S+)", (tmp_path / "script").read_text(), flags=re.MULTILINE))
    assert {"gpus-per-node=1", "partition=gpu", "time=30", "nodes=1", "array=0-1%2", "cpus-per-task=8"} <= asked
    done = done_in((tmp_path / "script.0").read_text() + (tmp_path / "script.1").read_text())
    assert len(done) == 2 and set(done.values()) == {1}


@pytest.mark.parametrize(("gpus", "seen"), [(("4", "GPU-7"), "GPU-7"), ((), "untouched")])
def test_each_process_has_its_own_gpu(gpus: tuple[str, ...], seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "untouched")
    threads = torch.get_num_threads()
    Share((), RunLocks([]), 2, True, gpus)(1)
    torch.set_num_threads(threads)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-m", "hydra/launcher=local_gpus", "device=cpu"], "jobs=N"),
        (["-m", "hydra/launcher=local_gpus", "jobs=0", "device=cpu"], "jobs=0"),
        (["-m", "hydra/launcher=slurm", "hydra.launcher.partitoin=gpu"], "partitoin"),
        (["-m", "hydra/launcher=slurn"], "slurm"),
        (["-m", "hydra/launcher=joblib"], "local_gpus"),
        (["-m", "hydra/sweeper=optuna"], "hydra/sweeper"),
        (["-m", "hydra.launcher.partition=gpu"], "hydra/launcher=slurm"),
        (["-m", "hydra/launcher=local_gpus", "hydra.launcher.partition=gpu"], "partition"),
        (["-m", "hydra/launcher=slurm", "hydra.launcher.timeout_min=soon"], "timeout_min"),
        (["-m", "jobs=2"], "hydra/launcher=local_gpus"),
        (["hydra/launcher=local_gpus", "jobs=2"], "coop run -m"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: list[str], told: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *words, *words_for(place, tmp_path / "results")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("coop: ") and told in err and len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_without_the_extra(place: Path, tmp_path: Path) -> None:
    """A launcher says what it needs."""
    words = ["run", "-m", *words_for(place, tmp_path / "results"), "hydra/launcher="]
    code = f"""
import sys
sys.modules["submitit"] = None
from coop.cli import main
sys.exit(min(main({words[:-1]} + [{words[-1]!r} + name]) for name in ("slurm", "local_gpus")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["coop: this launcher needs submitit: pip install 'coop-clip[slurm]'"] * 2

"""The runs of a sweep, by one process or several: locks on runs, the loop over them, and processes by submitit.

While a process does a run it holds a lock in the run's folder, which the system frees when the process ends, however
it ends. A file next to it marks the attempt, so that no run is tried twice in one sweep: the others see that it was
tried, also where the process died of it. A finished run's folder has neither.

Each process goes through the whole sweep and does what no other does, so that the load balances itself and a model is
loaded once by each process rather than once by each run.
"""

import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from coop.clip.backbone import check_device
from coop.config import RunConfig
from coop.errors import CoopError, first_line, one_line, raise_interruption, unknown
from coop.io import progress_display, remove_temporary_files, track, write_text
from coop.options import from_mapping
from coop.runs.grid import parsed_value
from coop.runs.key import RunKey
from coop.runs.run import Resources, execute, prepare, recording_failure
from coop.runs.store import FAILURE, RESULT, stored_run

LOCK, ATTEMPT = ".lock", ".attempt"
LOGS = ".sweep"  # folder in the results, for what launched processes print
LOCK_SECONDS = 0.1  # longer than another process's look at the lock, far shorter than a run
POLL_SECONDS = 1.0  # between two looks at the runs of others
Say = Callable[[str], None]


class Access(Enum):
    """Who may do a run: GRANTED to us; BUSY, another process does it; OVER, it is done or was tried in this sweep."""

    GRANTED = "granted"
    BUSY = "busy"
    OVER = "over"


class RunLocks:
    """The locks on the runs of one sweep, by their folders; made before its first run, and sent to its processes.

    What was tried before, by an earlier sweep, may be tried again.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._before = {folder: _attempt(folder) for folder in folders}

    @contextmanager
    def lock(self, folder: Path) -> Iterator[Access]:
        """Lock a run if it is free, while inside; the caller does it only where access is GRANTED.

        An error that leaves this block is the end of the attempt; an interruption (Ctrl-C, a cluster that wants the
        machine back, a full disk) withdraws it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=LOCK_SECONDS, poll_interval=LOCK_SECONDS / 4)
        except Timeout:
            yield Access.BUSY
            return
        try:
            if _done(folder) or _attempt(folder) not in (None, self._before[folder]):
                yield Access.OVER
            else:
                remove_temporary_files(folder)
                with _attempting(folder):
                    yield Access.GRANTED
        finally:
            lock.release()
            _unmark_finished(folder)


def is_locked(folder: Path) -> bool:
    """Tell whether a process is at a run, as far as a look without locking it can tell."""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


@contextmanager
def _attempting(folder: Path) -> Iterator[None]:
    _mark(folder)
    try:
        yield
    except OSError:
        with suppress(OSError):
            (folder / ATTEMPT).unlink(missing_ok=True)
        raise
    except Exception:
        _mark(folder)  # anew: it has failed also for a sweep that began meanwhile
        raise
    except BaseException:
        (folder / ATTEMPT).unlink(missing_ok=True)
        raise


def _mark(folder: Path) -> None:
    write_text(folder / ATTEMPT, f"{uuid.uuid4().hex} {socket.gethostname()} {os.getpid()}\n")


def _unmark_finished(folder: Path) -> None:
    """Remove a finished run's lock and attempt, also those of a process that was killed right after its result."""
    with suppress(OSError):
        if _done(folder):  # whoever still holds the old lock file sees the result
            for name in (LOCK, ATTEMPT):
                (folder / name).unlink(missing_ok=True)


def _attempt(folder: Path) -> str | None:
    try:
        return (folder / ATTEMPT).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _done(folder: Path) -> bool:
    return RESULT in os.listdir(folder)  # opens the folder: a network file system then looks again


@dataclass(frozen=True)
class Job:
    """A run to do: its configuration and its folder, without its data, so that it is small to send."""

    config: RunConfig
    folder: Path

    @property
    def done(self) -> bool:
        """Whether it has a result already."""
        return os.path.lexists(self.folder / RESULT)

    @property
    def name(self) -> str:
        """Its folder below the results, without the digits of its hash."""
        return run_name(self.folder, self.config.results)


def run_name(folder: Path, results: Path) -> str:
    """Return a run's name for people: its folder below the results, without the digits of its hash."""
    return re.sub(r"-[0-9a-f]{8}$", "", str(folder.relative_to(results)))


def work(jobs: Sequence[Job], locks: RunLocks, resources: Resources, say: Say, wait: bool) -> None:
    """Do the runs that no other process does, in this order. Each failure is recorded in its run's folder.

    With `wait`, return when the others are through with theirs, and do what they leave undone without having tried.
    Raises OSError where the system refuses to go on: no room, no permission.
    """
    with progress_display() as display:
        task = display.add_task("runs", total=len(jobs))
        left, over, waiting = list(jobs), 0, False
        failures: dict[str, int] = {}  # reason -> the first run that failed for it
        while left:
            busy = []
            for job in left:
                name = f"[{over + 1}/{len(jobs)}] {job.name}"
                try:
                    done = _attempted(job, locks, resources, say, name)
                except OSError:
                    raise
                except Exception as error:
                    reason = one_line(error, 1000) if isinstance(error, CoopError) else first_line(error)
                    first = failures.setdefault(reason, over + 1)
                    say(f"{name}  failed: {reason if first > over else f'as [{first}/{len(jobs)}]'}")
                    done = True
                if done:
                    over += 1
                    display.advance(task)
                else:
                    busy.append(job)
            if len(busy) == len(left):
                if not wait:
                    break
                if not waiting:
                    say(f"waiting for other processes, which are at {len(busy)} of these runs")
                    waiting = True
                time.sleep(POLL_SECONDS)
            left = busy
        display.remove_task(task)


def _attempted(job: Job, locks: RunLocks, resources: Resources, say: Say, name: str) -> bool:
    """Do a run if it is free; return whether it is over, here or elsewhere. Raises what the run fails with."""
    with locks.lock(job.folder) as access:
        if access is Access.GRANTED:
            with recording_failure(job.folder, RunKey.of(job.config)):
                run = prepare(job.config, resources)
                if run.folder != job.folder:
                    raise CoopError(f"the data is not the same as where the sweep was started: it is {run.folder}")
            result = execute(run, resources)
            seconds = sum(result["seconds"].values())
            tuned = ", settings chosen on the test images" * (result["validation"]["rule"] == "test")
            say(f"{name}  {100 * result['accuracy']:.2f} %{tuned}  ({seconds:.1f} s)")
    return access is not Access.BUSY


@dataclass(frozen=True)
class SlurmSettings:
    """What each Slurm job is given: submitit's names, set as hydra.launcher.partition=gpu. None: the cluster's default.

    `timeout_min` is the job's time limit; a job that reaches it is queued again `max_num_timeout` times. `setup` are
    shell commands for its start; `additional_parameters` are other options of sbatch.
    """

    name: str = "coop"
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 1
    cpus_per_task: int = 8
    mem_gb: float = 32
    timeout_min: int = 720
    signal_delay_s: int = 120
    max_num_timeout: int = 10
    array_parallelism: int = 64
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    comment: str | None = None
    gres: str | None = None
    cpus_per_gpu: int | None = None
    gpus_per_task: int | None = None
    mem_per_gpu: str | None = None
    mem_per_cpu: str | None = None
    setup: list[str] | None = None
    additional_parameters: dict[str, Any] = field(default_factory=dict)


LAUNCHERS = ("local_gpus", "slurm")
SLURM_JOBS = 8  # where nothing says how many


@dataclass(frozen=True)
class Launcher:
    """How a sweep's processes are started: `local_gpus` on this machine, or `slurm`. `jobs`: how many."""

    name: str
    jobs: int | None
    slurm: SlurmSettings


def launcher_of(words: Sequence[str]) -> Launcher | None:
    """Return the launcher that words ask for; None where this process does everything.

    Raises CoopError for other launchers, for settings that the launcher lacks, and where submitit is not installed.
    """
    settings = dict(map(_setting, words))
    if not settings:
        return None
    name, jobs = settings.pop("hydra/launcher", None), settings.pop("jobs", None)
    if "hydra/sweeper" in settings:
        raise CoopError("hydra/sweeper: a sweep is all combinations of the values given, and there is no other")
    if jobs is not None and (not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1):
        raise CoopError(f"jobs={jobs}: give a whole number, 1 or more")
    if name == "basic" and not settings and jobs is None:
        return None
    if name is None:
        raise CoopError(f"{words[0]} needs a launcher: hydra/launcher=local_gpus or hydra/launcher=slurm")
    if name not in LAUNCHERS:
        raise unknown("launcher", str(name), LAUNCHERS)
    inside = {key.removeprefix("hydra.launcher."): value for key, value in settings.items()}
    names = [f for f in SlurmSettings.__dataclass_fields__ if name == "slurm"]
    for key in inside:
        if key.split(".")[0] not in names:
            raise unknown(f"setting of hydra/launcher={name}", key, names or ["jobs"])
    slurm = from_mapping(SlurmSettings, inside, "hydra.launcher")
    _check_submitit()
    if name == "slurm" and shutil.which("srun") is None:
        raise CoopError("there is no Slurm here (no srun): start it on a login node, or hydra/launcher=local_gpus")
    return Launcher(str(name), jobs, slurm)


def _setting(word: str) -> tuple[str, Any]:
    key, _, value = word.partition("=")
    if key.startswith(("+", "~")):
        raise CoopError(f"{word}: give {key.lstrip('+~')}=VALUE")
    return key, parsed_value(key, value)


def _check_submitit() -> None:
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise CoopError("this launcher needs submitit: pip install 'coop-clip[slurm]'") from error


@dataclass(frozen=True)
class Share:
    """What each process of a launch does. It is pickled and travels to it."""

    jobs: tuple[Job, ...]
    locks: RunLocks
    count: int
    here: bool  # all on the machine that the sweep was started on
    gpus: tuple[str, ...]  # one for each process; empty: whatever the process finds

    def __call__(self, number: int) -> None:
        """Do runs until there is none left that no other process has taken."""
        import torch

        from coop.machine import available_cores, prepare_process

        prepare_process()
        if self.gpus:  # before CUDA starts
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus[number]
        cores = max(1, available_cores() // self.count) if self.here else available_cores()
        torch.set_num_threads(cores)
        jobs = [replace(job, config=replace(job.config, workers=min(job.config.workers, cores))) for job in self.jobs]
        start = len(jobs) * number // self.count  # each at its own place: other datasets, other models
        work([*jobs[start:], *jobs[:start]], self.locks, Resources(), lambda text: print(text, flush=True), wait=False)

    def checkpoint(self, number: int) -> Any:
        """Queue the process again when its time is over or the machine is wanted back: what is done is skipped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, number)


def launch(launcher: Launcher, jobs: Sequence[Job], locks: RunLocks, say: Say) -> list[str]:
    """Start the processes and wait for them; return, in words, what became of those that did not end well."""
    import submitit

    here = launcher.name == "local_gpus"
    gpus = visible_gpus() if here and any(job.config.device != "cpu" for job in jobs) else []
    count = min(_process_count(launcher, gpus), len(jobs))
    share = Share(tuple(jobs), locks, count, here, tuple(gpus[:count]))
    logs = jobs[0].config.results / LOGS
    executor: Any
    if here:
        executor = submitit.LocalExecutor(folder=logs)
        executor.update_parameters(timeout_min=100_000, stderr_to_stdout=True)  # submitit ends a process after that
    else:
        settings = {key: value for key, value in asdict(launcher.slurm).items() if value not in (None, {})}
        executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=settings.pop("max_num_timeout"))
        known = {"name": "job_name", "timeout_min": "time", "mem_gb": "mem", "tasks_per_node": "ntasks_per_node"}
        settings["mem_gb"] = f"{settings['mem_gb']:g}GB"
        executor.update_parameters(stderr_to_stdout=True, **{known.get(k, k): v for k, v in settings.items()})
    say(f"{count} processes share them; what they print: {logs}")
    with _watching(jobs):
        processes = executor.map_array(share, range(count))
        errors = [_outcome(process) for process in processes]
        if any(errors):  # of a process that was killed; others that were started by hand may go on
            _wait_for_others(jobs)
    return [error for error in errors if error]


def _outcome(process: Any) -> str | None:
    """Wait for a process; return, in words, why it did not end well."""
    try:
        error = process.exception()
    except Exception as uncompleted:  # it left no result: killed
        error = uncompleted
    return None if error is None else f"{type(error).__name__}: {_last_line(error)}"


def _last_line(error: BaseException) -> str:
    """Return what an exception that submitit carries says: of a traceback the last line."""
    lines = [line for line in str(error).splitlines() if line.strip(" -")]
    return " ".join(lines[-1].split())[:300] if lines else type(error).__name__


def _process_count(launcher: Launcher, gpus: Sequence[str]) -> int:
    asked = launcher.jobs
    if launcher.name == "slurm":
        return asked or SLURM_JOBS
    if asked is None and not gpus:
        raise CoopError("hydra/launcher=local_gpus starts a process for each GPU, and there is none: give jobs=N")
    if asked is not None and gpus and asked > len(gpus):
        raise CoopError(f"jobs={asked}: there are {len(gpus)} GPUs here, and each has one process: leave jobs out")
    return asked or len(gpus)


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES knows the GPUs that this process may use."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


@contextmanager
def _watching(jobs: Sequence[Job]) -> Iterator[None]:
    """Show how many runs are done, while others do them."""
    over = threading.Event()
    with progress_display() as display:
        task = display.add_task("runs", total=len(jobs))

        def look() -> None:
            while not over.wait(2 * POLL_SECONDS):
                display.update(task, completed=sum(job.done for job in jobs))

        watcher = threading.Thread(target=look, daemon=True)
        if not display.disable:
            watcher.start()
        try:
            yield
        finally:
            over.set()
            display.remove_task(task)


def _wait_for_others(jobs: Sequence[Job]) -> None:
    """Return when two looks in a row, with a pause, find no process at any of these runs."""
    quiet = 0
    while quiet < 2:
        time.sleep(2 * POLL_SECONDS)
        busy = any(is_locked(job.folder) for job in jobs if not job.done)
        quiet = 0 if busy else quiet + 1


def run_one(config: RunConfig, say: Say) -> None:
    """Do one run, or wait for the process that does it, and describe its result."""
    resources = Resources()
    run = prepare(config, resources)
    if run.done:
        _unmark_finished(run.folder)
        say(f"done already: {run.folder}")
    else:
        check_device(config.device)  # not in `prepare`: a cluster's login node has no GPU
    locks, waiting = RunLocks([run.folder]), False
    while not run.done:
        with locks.lock(run.folder) as access, progress_display():
            if access is Access.GRANTED:
                execute(run, resources)
        if access is Access.OVER and not run.done:
            raise CoopError(f"another process tried this run meanwhile, and it failed: see {run.folder}")
        if access is Access.BUSY:
            if not waiting:
                say("waiting for another process, which is at this run")
                waiting = True
            time.sleep(POLL_SECONDS)
    say(describe(run.folder, config.results))


def run_sweep(configs: Sequence[RunConfig], launcher: Launcher | None, say: Say) -> int:
    """Do what is missing of the runs, each once; what fails does not stop the rest. Return the exit code.

    Runs whose data is not there are left out. One backbone after the other is loaded, once.
    """
    resources = Resources()
    jobs, lacking = _checked_jobs(configs, resources)
    for name, reasons in lacking.items():
        say(f"{name}: {len(reasons)} run{'s' * (len(reasons) != 1)} left out: {reasons[0]}")
    if not jobs:
        return 1
    missing = [job for job in jobs if not job.done]
    for job in jobs:
        _unmark_finished(job.folder)
    say(f"{len(jobs)} runs: {len(jobs) - len(missing)} done already, {len(missing)} to do")
    missing.sort(key=lambda job: (repr(job.config.backbone), job.config.precision, job.config.dataset.name))
    locks = RunLocks(job.folder for job in missing)
    troubles: list[str] = []
    try:
        if missing and launcher:
            troubles = launch(launcher, missing, locks, say)
        else:
            work(missing, locks, resources, say, wait=True)
    except OSError:
        say(f"stopped: {sum(job.done for job in jobs)} of {len(jobs)} runs are done and kept")
        raise
    return 1 if _closing(jobs, troubles, say) or lacking else 0


def _checked_jobs(configs: Sequence[RunConfig], resources: Resources) -> tuple[list[Job], dict[str, list[str]]]:
    """Return the runs that can be done, each once, and by dataset why some cannot."""
    jobs: dict[Path, Job] = {}
    lacking: dict[str, list[str]] = {}
    for config in track(configs, "checking", len(configs)):
        try:
            folder = prepare(config, resources).folder
            jobs.setdefault(folder, Job(config, folder))
        except CoopError as error:
            raise_interruption(error)
            lacking.setdefault(config.dataset.name, []).append(str(error))
    return list(jobs.values()), lacking


def _closing(jobs: Sequence[Job], troubles: Sequence[str], say: Say) -> bool:
    """Say what is there now, by what lies on disk; return whether something is missing."""
    results = jobs[0].config.results
    for trouble in troubles:
        say(f"a process of the launcher ended early: {trouble} (what it printed: {results / LOGS})")
    left = [job for job in jobs if not job.done]
    failed = sum((job.folder / FAILURE).is_file() for job in left)
    damaged = [job for job in jobs if job.done and stored_run(job.folder).state == "damaged"]
    text = f"{len(jobs) - len(left) - len(damaged)} done, {failed} failed"
    if failed:
        text += f" (why: failure.json in its folder under {results})"
    if damaged:
        text += f", {len(damaged)} with a damaged result (remove the folder to do it again: {damaged[0].folder})"
    if len(left) > failed:
        text += f", {len(left) - failed} interrupted: the same command does them"
    say(text if left else f"{text}; see: coop table {results}")
    return bool(left or troubles or damaged)


def describe(folder: Path, results: Path) -> str:
    """Return what a finished run found, in a few lines. Raises CoopError where its result is damaged."""
    run = stored_run(folder)
    if run.state != "done":
        raise CoopError(f"{folder}: {run.error}: mend that, or remove the folder and run it again")
    lines, width = [run_name(folder, results)], max(map(len, run.targets))
    for name, m in run.targets.items():
        accuracy, f1, ece = (f"{100 * m[key]:.2f} %" for key in ("accuracy", "macro_f1", "ece"))
        images = f"{m['n']} image{'s' * (m['n'] != 1)}"
        lines.append(f"  {name:<{width}}  accuracy {accuracy}  macro F1 {f1}  ECE {ece}  ({images})")
    lines += [f"  {name.replace('_', ' ')} {100 * value:.2f} %" for name, value in run.summary.items()]
    if run.own_split:
        lines.append(f"  split: {run.split_source}")
    lines += [f"  note: {note}" for note in run.notes]
    return "\n".join([*lines, f"  in {folder}"])

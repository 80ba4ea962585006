"""A sweep in several processes, started by a launcher of Hydra's: on a cluster, or one for each GPU of this machine.

Each process goes through the whole sweep and does what no other does, so that the load balances itself and a model is
loaded once by each process rather than once by each run.
"""

import importlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig
from rich.console import Console

from coop.config import first_line
from coop.errors import CoopError
from coop.io import progress_display, resource_folder
from coop.runs.claims import Claims, being_done
from coop.runs.grid import register_datasets, sentence
from coop.runs.workers import POLL, Job, work
from coop.runs.workshop import Workshop

JOBS = 8  # on a cluster, where nothing says how many


def of_the_launcher(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words on how a sweep is launched (Hydra's own, and `jobs`) from those on what is run."""
    ours = [text for text in overrides if re.match(r"[+~]*(hydra[./]|jobs=)", text)]
    return ours, [text for text in overrides if text not in ours]


@dataclass(frozen=True)
class Share:
    """What each process of a launch does: Hydra's task function, which travels to it."""

    jobs: tuple[Job, ...]
    claims: Claims
    count: int
    here: bool  # all on the machine that the sweep was started on
    gpus: tuple[str, ...]  # one for each process; empty: whatever the process finds

    def __call__(self, _: DictConfig) -> None:
        """Do runs until there is none left that no other process has taken."""
        number = HydraConfig.get().job.num
        if self.gpus:  # before CUDA starts
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus[number]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = max(1, cores // self.count) if self.here else cores
        torch.set_num_threads(cores)
        jobs = [replace(job, config=replace(job.config, workers=min(job.config.workers, cores))) for job in self.jobs]
        start = len(jobs) * number // self.count  # each at its own place: other datasets, other models
        work([*jobs[start:], *jobs[:start]], self.claims, Workshop(), wait=False)


class Launch:
    """A launcher, checked and ready, as the command line's words ask for it."""

    def __init__(self, settings: Sequence[str]) -> None:
        register_datasets()
        with initialize_config_dir(str(resource_folder("conf")), version_base="1.3", job_name="coop"):
            self._loader = GlobalHydra.instance().config_loader()
            try:
                self._config = self._loader.load_configuration("config", list(settings), RunMode.MULTIRUN)
            except HydraException as error:
                raise CoopError(sentence(error)) from error
        self._target = str(self._config.hydra.launcher["_target_"])
        self._asked: int | None = self._config.jobs
        if self._target.startswith("hydra_plugins."):
            try:
                importlib.import_module(self._target.rpartition(".")[0])
            except ImportError as error:
                raise CoopError("this launcher needs submitit: pip install 'coop-clip[slurm]'") from error
            if self._target.endswith(".SlurmLauncher") and shutil.which("srun") is None:
                raise CoopError(
                    "there is no Slurm here (no srun): start it on a login node, or hydra/launcher=local_gpus"
                )
        elif self._asked is not None:
            raise CoopError(f"jobs={self._asked} needs a launcher: hydra/launcher=local_gpus or hydra/launcher=slurm")

    @classmethod
    def of(cls, settings: Sequence[str]) -> "Launch | None":
        """Return the launcher that was asked for; None for Hydra's own, which does everything in this process."""
        launch = cls(settings) if settings else None
        return None if launch is None or launch._target.endswith("BasicLauncher") else launch

    def __call__(self, jobs: Sequence[Job], claims: Claims) -> list[str]:
        """Start the processes and wait for them; return, in words, what became of those that did not end well."""
        here = self._target.endswith(".LocalLauncher")
        gpus = visible_gpus() if here and any(job.config.device != "cpu" for job in jobs) else []
        count = min(self._count(here, gpus), len(jobs))
        share = Share(tuple(jobs), claims, count, here, tuple(gpus[:count]))
        context = HydraContext(config_loader=self._loader, callbacks=Callbacks())
        self._config.results = str(jobs[0].config.results)
        launcher = Plugins.instance().instantiate_launcher(context, share, self._config)
        place = re.sub(r"(['\\])", r"\\\1", self._config.results)
        console = Console(soft_wrap=True, highlight=False)
        console.print(f"{count} processes share them; what they print: {self._config.hydra.sweep.dir}", markup=False)
        with _watching(jobs):
            try:
                returned = launcher.launch([[f"results='{place}'"]] * count, initial_job_idx=0)
            except Exception as error:  # of a process that was killed; the others go on
                _wait_for_others(jobs)
                return [first_line(error)]
        return [trouble for trouble in map(_trouble, returned) if trouble]

    def _count(self, here: bool, gpus: Sequence[str]) -> int:
        asked = self._asked
        if here and asked is None and not gpus:
            raise CoopError("this launcher starts one process for each GPU, and there is none here: say jobs=N")
        if here and gpus and asked is not None and asked > len(gpus):
            raise CoopError(f"jobs={asked}: there are {len(gpus)} GPUs here, and each has one process: leave jobs out")
        count = asked if asked is not None else len(gpus) or JOBS
        if not isinstance(count, int) or count < 1:
            raise CoopError(f"jobs={asked}: give a whole number, 1 or more")
        return count


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES knows the GPUs that this process may use."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _trouble(returned: JobReturn) -> str | None:
    try:
        returned.return_value  # noqa: B018 - raises what the process raised
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


@contextmanager
def _watching(jobs: Sequence[Job]) -> Iterator[None]:
    """Show how many runs are done, while others do them."""
    over = threading.Event()
    with progress_display() as display:
        task = display.add_task("runs", total=len(jobs))

        def look() -> None:
            while not over.wait(2 * POLL):
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
        time.sleep(2 * POLL)
        busy = any(being_done(job.folder) for job in jobs if not job.done)
        quiet = 0 if busy else quiet + 1

"""The small world of the campaign: a tiny CLIP on disk, coloured images, and commands that use them."""

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from experiments.campaign.child import NO_FAULT, Fault, Outcome, Running

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 2},
}
COLOURS = {"red cup": (200, 30, 30), "green_leaf": (30, 200, 30), "blue car": (30, 30, 200)}
TRAINED = ("method=coop", "epochs=2", "augment.views=2", "n_ctx=4")
SWEEP = ("-m", "method=zero_shot,coop", "shots=1,2", "seed=1,2", *TRAINED[1:])
LEFTOVERS = ("*.tmp", "*.part", "*.partial", "*.attempt*", ".*.tmp", ".prepare")

Main = Callable[[Sequence[str]], int | None]


def write_world(folder: Path) -> None:
    """Write `tiny.json`, `tiny.pt`, `images/{train,val,test}/CLASS/`, `pairs.csv`, `images.csv` and `colours.zip`."""
    folder.mkdir(parents=True)
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    torch.save(tiny_model().state_dict(), folder / "tiny.pt")
    generator = np.random.default_rng(0)
    rows, pairs = ["path,label,class name,split"], ["image,text"]
    for part, count in (("train", 4), ("val", 2), ("test", 5)):
        for label, (name, colour) in enumerate(COLOURS.items()):
            (folder / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + generator.integers(-30, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / name / f"{i}.png")
                rows.append(f"{part}/{name}/{i}.png,{label},{name},{part}")
                pairs.append(f"images/{part}/{name}/{i}.png,a {name}")
    shutil.make_archive(str(folder / "colours"), "zip", folder, "images/train")
    (folder / "images.csv").write_text("\n".join(rows) + "\n")
    (folder / "pairs.csv").write_text("\n".join(pairs) + "\n")


def tiny_model() -> open_clip.CLIP:
    """Return a CLIP of 16 channels with random weights, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.CLIP(**CONFIG)


class World:
    """A folder with everything in it; commands run in copies of its parts, and may not write elsewhere."""

    def __init__(self, folder: Path, coop: Main, pretrain: Main) -> None:
        self.folder, self.mains = folder, {"coop": coop, "pretrain": pretrain}
        self.base = folder / "base"
        self._number = 0
        self._open: list[Path] = []
        write_world(self.base)

    def case(self, *parts: str) -> Path:
        """Return a new folder with copies of `parts` of the world."""
        self._number += 1
        case = self.folder / "cases" / f"{self._number:06d}"
        case.mkdir(parents=True)
        self._open.append(case)
        for part in parts:
            source = self.folder / part
            if source.is_dir():
                shutil.copytree(source, case / source.name, symlinks=True)
            elif source.exists():
                shutil.copy2(source, case / source.name)
        return case

    def close(self, keep: bool = False) -> None:
        """Remove the folders that were made since the last call, or keep them."""
        for case in [] if keep else self._open:
            shutil.rmtree(case, ignore_errors=True)
        self._open = []

    def start(
        self,
        words: Sequence[str],
        case: Path,
        main: str = "coop",
        fault: Fault = NO_FAULT,
        file_limit: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> Running:
        """Start a command in `case`, with its own home, cache and temporary folder there."""
        for name in ("home", "tmp"):
            (case / name).mkdir(exist_ok=True)
        places = {"HOME": case / "home", "TMPDIR": case / "tmp", "COOP_CACHE": case / "cache"}
        variables = {**{key: str(value) for key, value in places.items()}, **(environment or {})}
        return Running(self.mains[main], words, case, case, variables, fault, file_limit)

    def run(
        self,
        words: Sequence[str],
        case: Path,
        main: str = "coop",
        fault: Fault = NO_FAULT,
        kill_after: float | None = None,
        file_limit: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> Outcome:
        """Start a command in `case` and wait for its end."""
        return self.start(words, case, main, fault, file_limit, environment).wait(kill_after)

    def run_words(self, *words: str) -> list[str]:
        """Return the words of `coop run` for the world's images and backbone; later words win."""
        return ["run", *self.own_words(), *words]

    def own_words(self) -> list[str]:
        """Return the overrides that name the world's images and backbone."""
        return [
            "dataset=folder",
            f"dataset.root={self.base / 'images'}",
            "dataset.name=colours",
            "backbone=custom",
            "backbone.name=tiny",
            f"backbone.architecture={self.base / 'tiny.json'}",
            f"backbone.pretrained={self.base / 'tiny.pt'}",
            "workers=0",
            "device=cpu",
        ]


def serve(folder: Path) -> str:
    """Serve a folder's files for as long as this process lives; return the address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Say nothing of a client that was killed."""

    server = Server(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def leftovers(case: Path) -> list[str]:
    """Return temporary files that a command left behind in results, reports and output (not in its cache)."""
    found = {path for pattern in LEFTOVERS for path in case.rglob(pattern)}
    return sorted(
        path.relative_to(case).as_posix()
        for path in found
        if path.relative_to(case).parts[0] not in ("home", "tmp", "cache")
    )

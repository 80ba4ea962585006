"""A folder that may not be read, also where the tests run as the superuser, who may read everything."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def closed_folder(name: str) -> Iterator[Path]:
    """Yield a folder whose subfolder `name` may not be read while inside."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / name).mkdir()
        Path(place).chmod(0o755)
        (Path(place) / name).chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(place)
        finally:
            os.seteuid(user)
            (Path(place) / name).chmod(0o700)

"""A web server for download tests: byte ranges, and every way of failing that real ones have."""

import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Files(ThreadingHTTPServer):
    """Serve `files`; `drops` maps a path to how many bytes each coming request sends before the connection breaks."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.drops: dict[str, list[int]] = {}
        self.statuses: dict[str, list[int]] = {}
        self.types: dict[str, str] = {}
        self.redirects: dict[str, str] = {}
        self.slow: dict[str, float] = {}
        self.ranges = True
        self.version = "1"
        self.requests: list[tuple[str, str | None]] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(BaseHTTPRequestHandler):
    """Answer GET with 200, or 206 for a range of the same version."""

    server: Files

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        wanted = self.headers.get("Range")
        self.server.requests.append((path, wanted))
        if self.server.statuses.get(path):
            self.send_error(self.server.statuses[path].pop(0))
            return
        if path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[path])
            self.end_headers()
            return
        if path not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[path]
        start = 0
        tag = f'"{self.server.version}"'
        if wanted and self.server.ranges and self.headers.get("If-Range") == tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", tag)
        self.send_header("Content-Type", self.server.types.get(path, "application/octet-stream"))
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        drops = self.server.drops.get(path)
        end = start + drops.pop(0) if drops else len(content)
        step = 1000 if path in self.server.slow else len(content)
        for piece in range(start, end, step):
            time.sleep(self.server.slow.get(path, 0.0))
            try:
                self.wfile.write(content[piece : min(piece + step, end)])
            except OSError:
                return  # the client has had enough

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Files]:
    """Serve `files` until the block ends."""
    with Files(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def raw_server(reply: bytes) -> Iterator[str]:
    """Answer every request with `reply` as it is; yield the address."""

    class Raw(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(reply)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Raw) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/a"
        finally:
            server.shutdown()
            thread.join()

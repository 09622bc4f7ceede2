"""A stand-in for Kaggle on loopback that keeps what the real client sends, and runs the client."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# The client's code as it is, but for the address: not everyone may bind the stand-in to port 80.
ADDRESS = """
import sys
from kagglesdk import kaggle_env
kaggle_env._env_to_endpoint[kaggle_env.KaggleEnv.LOCAL] = sys.argv.pop(1)
sys.argv[0] = "kaggle"
"""
CLIENT = f"""{ADDRESS}
from kaggle.cli import main
sys.exit(main())
"""


# Kaggle's image has such a module: it runs at the start of every Python process.
SITE = """
import logging
import sys
logging.basicConfig(level=logging.INFO, handlers=[logging.FileHandler({log!r}, mode="w")])
if {bare}:
    sys.path = [path for path in sys.path if not path.endswith(("site-packages", "dist-packages"))]
"""


def customize_site(folder: Path, log: Path, bare: bool = False) -> None:
    """Make every process with `folder` in its PYTHONPATH log as one on Kaggle does, to a file.

    A `bare` one finds no other packages than in its PYTHONPATH.
    """
    text = SITE.format(log=str(log), bare=bare)
    (folder / "sitecustomize.py").write_text(text, encoding="utf-8")


class Kaggle:
    """What arrived: every call, the uploaded files, the datasets and the kernels made of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.uploads: dict[str, tuple[str, bytes]] = {}  # token → name and content
        self.datasets: dict[str, dict[str, bytes]] = {}  # owner/slug → its latest version's files
        self.kernels: dict[str, dict[str, Any]] = {}  # owner/slug → the request
        self.outputs: dict[str, Path] = {}  # owner/slug of a kernel → what its run left
        self.requests: dict[str, dict[str, Any]] = {}  # call → its latest request
        self.address = ""

    def answer(self, call: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body, as the client's own classes read them."""
        self.calls.append(call)
        self.requests[call] = request
        ref = f"{request.get('ownerSlug')}/{request.get('slug') or request.get('datasetSlug')}"
        made = {"ref": ref, "url": f"{self.address}/{ref}", "status": "ok", "error": ""}
        if call == "GetDatasetStatus":
            return (200, {"status": "ready"}) if ref in self.datasets else (404, {"message": ref})
        if call == "StartBlobUpload":
            token = f"token-{len(self.uploads)}"
            self.uploads[token] = request["name"], b""
            return 200, {"token": token, "createUrl": f"{self.address}/upload/{token}"}
        if call == "CreateDataset" and ref not in self.datasets:
            self.datasets[ref] = self.files(request)
            return 200, made
        if call == "CreateDatasetVersion" and ref in self.datasets:
            self.datasets[ref] = self.files(request["body"])
            return 200, made
        if call == "CreateCodeSubmission":
            return 200, {"message": "submitted", "ref": 1}
        if call == "SaveKernel":
            self.kernels[request["slug"]] = request
            return 200, {"ref": request["slug"], "url": self.address, "versionNumber": 1}
        if call == "GetKernelSessionStatus" and _kernel_of(request) in self.kernels:
            return 200, {"status": "COMPLETE"}
        if call == "ListKernelSessionOutput":
            return 200, self.list_output(request)
        return 400, {"message": f"{call} of {ref}: not here"}

    def list_output(self, request: dict[str, Any]) -> dict[str, Any]:
        """A page of the files that a kernel left, by their paths from its working folder."""
        ref = _kernel_of(request)
        folder, first = self.outputs[ref], int(request.get("pageToken") or 0)
        last = first + request["pageSize"]
        names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
        urls = [(name, f"{self.address}/output/{ref}/{name}") for name in names[first:last]]
        page: dict[str, Any] = {"files": [{"fileName": name, "url": url} for name, url in urls]}
        return page | ({"nextPageToken": str(last)} if names[last:] else {"log": "its log"})

    def output(self, path: str) -> bytes:
        """A file that a kernel left, by its address's path."""
        owner, slug, name = path.removeprefix("/output/").split("/", 2)
        return (self.outputs[f"{owner}/{slug}"] / name).read_bytes()

    def files(self, request: dict[str, Any]) -> dict[str, bytes]:
        """The files that a request names by their tokens."""
        return dict(self.uploads[file["token"]] for file in request.get("files", []))


def _kernel_of(request: dict[str, Any]) -> str:
    return f"{request['userName']}/{request['kernelSlug']}"


def handler_of(kaggle: Kaggle) -> type[BaseHTTPRequestHandler]:
    """Takes calls by POST and files by PUT, gives files by GET."""

    class Handler(BaseHTTPRequestHandler):
        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def reply(self, status: int, answer: dict[str, Any] | bytes) -> None:
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            call = self.path.rpartition("/")[2]
            self.reply(*kaggle.answer(call, json.loads(self.body())))

        def do_GET(self) -> None:
            self.reply(200, kaggle.output(self.path))

        def do_PUT(self) -> None:
            token = self.path.rpartition("/")[2]
            kaggle.uploads[token] = kaggle.uploads[token][0], self.body()
            self.reply(200, {})

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def serve() -> Iterator[Kaggle]:
    """A Kaggle that answers on a free port until the block ends."""
    kaggle = Kaggle()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(kaggle))
    kaggle.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield kaggle
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def client_environment(home: Path, login: bool = True) -> dict[str, str]:
    """A user of the client who has nothing but a name and a key, or not even that."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("KAGGLE_", "XDG_"))}
    own = {"HOME": str(home), "TMPDIR": str(home), "NO_PROXY": "*"}
    user = {"KAGGLE_USERNAME": "somebody", "KAGGLE_KEY": "key"} if login else {}
    return keep | own | user | {"KAGGLE_API_ENVIRONMENT": "LOCALHOST"}


def run_with_client(
    kaggle: Kaggle, home: Path, script: str, login: bool = True, **more: str
) -> Any:
    """Python code that uses the client against the stand-in; the JSON that it prints last."""
    ended = subprocess.run(
        [sys.executable, "-c", ADDRESS + script, kaggle.address],
        env=client_environment(home, login) | more,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def run_client(kaggle: Kaggle, home: Path, *arguments: str | Path) -> str:
    """`kaggle …` with its own code against the stand-in; what it printed."""
    command = [sys.executable, "-c", CLIENT, kaggle.address, *map(str, arguments)]
    environment = client_environment(home)
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr

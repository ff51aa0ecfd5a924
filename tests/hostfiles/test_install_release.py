"""install-release, from a file and from a server that stumbles."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import io
import itertools
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from hostfiles.templates import FOLDER
from tests.hostfiles.conftest import Root

pytestmark = pytest.mark.machines


@functools.cache
def release() -> bytes:
    """The tarball of one program."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo("demo-1.0.linux-amd64/demo")
        info.mode, info.size, info.uid = 0o775, 2, 1000
        tar.addfile(info, io.BytesIO(b"hi"))
    return buffer.getvalue()


@pytest.fixture
def tarball(tool_root: Root) -> str:
    """A release of one program, in the host's root; its sha256."""
    file = tool_root.upper / "srv/demo.tar.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(release())
    program = (FOLDER / "install-release").read_text()
    tool_root.write("/usr/local/sbin/install-release", program, 0o755)
    return hashlib.sha256(release()).hexdigest()


def test_a_release_is_unpacked_under_its_name_and_version(tool_root: Root, tarball: str) -> None:
    argv = ["install-release", "demo", "1.0", "file:///srv/demo.tar.gz", tarball]
    for _ in range(2):
        done = tool_root.run(argv)
        assert done.returncode == 0, done.stderr
    stat = tool_root.run(["stat", "-c", "%a %U", "/opt/releases/demo-1.0/demo"]).stdout
    assert stat == "755 root\n"
    assert tool_root.run(["ls", "-A", "/opt/releases"]).stdout.count(".demo") == 0


@pytest.mark.usefixtures("tarball")
def test_another_sum_is_refused_with_both(tool_root: Root, tarball: str) -> None:
    done = tool_root.run(["install-release", "demo", "1.0", "file:///srv/demo.tar.gz", "0" * 64])
    assert done.returncode == 1
    assert tarball in done.stderr
    assert "0" * 64 in done.stderr
    assert tool_root.run(["test", "-e", "/opt/releases/demo-1.0"]).returncode == 1


@pytest.mark.usefixtures("tarball")
def test_one_that_is_not_there_is_told_at_once(tool_root: Root) -> None:
    # The root has no network of ours to serve on: a server of its own, on its loopback.
    script = f"""
        ip link set lo up
        python3 -m http.server --bind 127.0.0.1 8000 >/dev/null 2>&1 &
        until (exec 3<>/dev/tcp/127.0.0.1/8000) 2>/dev/null; do sleep 0.1; done
        install-release demo 1.0 http://127.0.0.1:8000/none.tar.gz {"0" * 64}
        told=$?
        kill %1
        exit $told
    """
    done = tool_root.run(["bash", "-mc", script])
    assert done.returncode == 1
    assert "HTTP Error 404" in done.stderr
    assert "attempt 2" not in done.stderr


def test_what_a_killed_one_left_is_removed_and_one_that_still_runs_is_waited_for(
    tool_root: Root, tarball: str
) -> None:
    tool_root.write("/opt/releases/.demo-left/tarball", "half")
    install = f"install-release demo 1.0 file:///srv/demo.tar.gz {tarball}"
    locked = "flock /opt/releases sh -c 'sleep 1; mkdir /opt/releases/demo-1.0' & sleep 0.3; "
    done = tool_root.run(["sh", "-c", f"{locked} exec {install}"])
    assert done.returncode == 0, done.stderr
    there = tool_root.run(["ls", "-A", "/opt/releases"]).stdout.split()
    assert [name for name in there if "demo" in name] == ["demo-1.0"]
    assert tool_root.run(["ls", "-A", "/opt/releases/demo-1.0"]).stdout == "", "not ours"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """install-release in this process, which brings releases to a folder of the test's."""
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    loader = importlib.machinery.SourceFileLoader(
        "install_release", str(FOLDER / "install-release")
    )
    spec = importlib.util.spec_from_loader("install_release", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    monkeypatch.setattr(module, "RELEASES", tmp_path / "releases")
    return module


class Stumbling(BaseHTTPRequestHandler):
    """Two answers that end too soon, without an error of the connection, and a whole one."""

    protocol_version = "HTTP/1.1"
    numbers = itertools.count(1)

    def do_GET(self) -> None:
        data, half = release(), release()[: len(release()) // 2]
        number = next(self.numbers)
        self.send_response(200)
        if number == 2:
            self.send_header("Transfer-Encoding", "chunked")
            data, half = b"%x\r\n%b" % (len(data), half), b""
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(half if number == 1 else data)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def test_a_download_that_is_cut_off_is_tried_again(
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Stumbling, "numbers", itertools.count(1))
    waits: list[float] = []
    monkeypatch.setattr(program.time, "sleep", waits.append)
    with ThreadingHTTPServer(("127.0.0.1", 0), Stumbling) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/demo.tar.gz"
        program.main("demo", "1.0", url, hashlib.sha256(release()).hexdigest())
        server.shutdown()
    first, second = capsys.readouterr().err.splitlines()
    size = len(release())
    assert f"{url}: cut off after {size // 2} of {size} bytes (attempt 1)" in first
    assert "IncompleteRead" in second
    assert waits == [2, 4]
    assert (program.RELEASES / "demo-1.0/demo").read_bytes() == b"hi"


def test_a_release_is_on_the_disk_before_it_has_its_name(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a name on empty files would pass for a release, for ever."""
    steps: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        steps.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        steps.append(("rename", target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    tarball = tmp_path / "demo.tar.gz"
    tarball.write_bytes(release())
    program.main("demo", "1.0", tarball.as_uri(), hashlib.sha256(release()).hexdigest())
    at = steps.index(("rename", "demo-1.0"))
    assert {*steps[:at]} == {("fsync", "demo-1.0.linux-amd64"), ("fsync", "demo")}
    assert steps[at + 1 :] == [("fsync", "releases")]

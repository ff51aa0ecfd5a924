"""monitored-host: what it sees of a host, and what the real exporter says to a configuration.

Its steps with real services, users and firewalls are shown on booted machines (tests/sandbox).
"""

from __future__ import annotations

import ast
import os
import runpy
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hostfiles.model import Leaf
from hostfiles.templates import FOLDER
from tests.hostfiles.conftest import SLAVE, Authority, ToolImage

PROGRAM = FOLDER / "monitored-host"
CONFIGS = Path(__file__).with_name("web_configs")
NAME = "core01.example.internal"


@pytest.fixture(scope="session")
def program() -> SimpleNamespace:
    """The program's functions."""
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


# ---- which Python --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["monitored-host", "apply-bundle", "install-release"])
def test_it_is_written_in_python_3_9(name: str) -> None:
    ast.parse((FOLDER / name).read_text(), feature_version=(3, 9))


def test_an_older_python_gets_far_enough_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    source = PROGRAM.read_text()
    ast.parse(source, feature_version=(3, 6))
    # This one would be a syntax error there, before anything is said.
    assert "import annotations" not in source
    monkeypatch.setattr(sys, "version_info", (3, 8, 10))
    with pytest.raises(SystemExit, match=r"3\.9 is needed: .* `targets`"):
        exec(compile(source, "monitored-host", "exec"), {"__name__": "__main__"})  # noqa: S102


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [[], ["install"], ["install", "x"], ["remove"], ["ready", "127.0.0.1"], ["destroy", "x"]],
)
def test_anything_else_is_answered_with_the_usage(argv: list[str]) -> None:
    done = run(argv)
    assert done.returncode == 2
    assert "check-config BINARY CONFIG" in done.stderr


def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *argv], capture_output=True, text=True, timeout=60
    )


def test_another_format_of_delivery_is_refused(program: SimpleNamespace) -> None:
    with pytest.raises(program.Refused, match="format is 2, not 1"):
        program.install({"format": 2})


# ---- what listens --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0100007F", "127.0.0.1"),
        ("0B01140A", "10.20.1.11"),
        ("00000000", "any"),
        ("00000000000000000000000000000000", "any"),
        ("00000000000000000000000001000000", "::1"),
        ("B80D01200000000000000000FE000000", "2001:db8::fe"),
        ("0000000000000000FFFF00000100007F", "127.0.0.1"),
        ("0000000000000000FFFF000000000000", "any"),
    ],
)
def test_the_kernels_spelling_of_addresses(
    program: SimpleNamespace, text: str, address: str
) -> None:
    assert str(program.parse_address(text)) == address


@pytest.mark.parametrize(
    ("bound", "family", "wanted", "in_the_way"),
    [
        ("127.0.0.1", socket.AF_INET, "127.0.0.1", True),
        ("127.0.0.1", socket.AF_INET, "", True),
        ("127.0.0.1", socket.AF_INET, "127.0.0.2", False),
        ("0.0.0.0", socket.AF_INET, "127.0.0.2", True),  # noqa: S104
        ("::", socket.AF_INET6, "127.0.0.2", True),
        ("::1", socket.AF_INET6, "127.0.0.1", False),
    ],
)
def test_a_listener_in_the_way_is_named(
    program: SimpleNamespace,
    bound: str,
    family: socket.AddressFamily,
    wanted: str,
    in_the_way: bool,
) -> None:
    with socket.create_server((bound, 0), family=family) as server:
        found = program.listeners(wanted, server.getsockname()[1])
        this = f"{Path('/proc/self/exe').readlink()} (process {Path('/proc/self').readlink()})"
    assert found == ([this] if in_the_way else [])


def test_a_connection_is_no_listener(program: SimpleNamespace) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        assert program.listeners("", client.getsockname()[1]) == []


def test_an_address_of_another_host_is_refused(program: SimpleNamespace) -> None:
    program.check_address("")
    program.check_address("127.0.0.1")
    with pytest.raises(program.Refused, match=r"192\.0\.2\.77 is no address of this host"):
        program.check_address("192.0.2.77")


# ---- what is remembered --------------------------------------------------------------------------


@pytest.fixture
def record() -> dict[str, Any]:
    return {"files": [], "trees": [], "folders": []}


def delivery(folder: Path, *names: str) -> dict[str, Any]:
    files = [{"path": f"{folder}/{name}"} for name in names]
    return {
        "state_directory": f"{folder}/state",
        "bundle": {"files": files, "releases": [{"name": "demo", "version": "1"}]},
    }


def test_folders_that_are_missing_are_noted_parents_first(
    program: SimpleNamespace, record: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    program.note(record, delivery(tmp_path, "there/a", "new/deep/b"))
    ours = [folder for folder in record["folders"] if folder.startswith(str(tmp_path))]
    assert ours == [f"{tmp_path}/new", f"{tmp_path}/new/deep"]
    assert record["files"] == [f"{tmp_path}/there/a", f"{tmp_path}/new/deep/b"]
    assert record["trees"] == [f"{tmp_path}/state", "/opt/releases/demo-1"]


def test_what_was_noted_once_may_be_there_and_stays_noted(
    program: SimpleNamespace, record: dict[str, Any], tmp_path: Path
) -> None:
    program.note(record, delivery(tmp_path, "new/a"))
    (tmp_path / "new").mkdir()
    (tmp_path / "new/a").touch()
    program.note(record, delivery(tmp_path, "new/a", "new/b"))
    assert f"{tmp_path}/new" in record["folders"]
    assert record["files"] == [f"{tmp_path}/new/a", f"{tmp_path}/new/b"]


@pytest.mark.parametrize("name", ["a", "state"])
def test_what_is_there_and_not_ours_is_refused_by_name(
    program: SimpleNamespace, record: dict[str, Any], tmp_path: Path, name: str
) -> None:
    # A link that leads nowhere is there, too.
    (tmp_path / name).symlink_to("/nowhere")
    with pytest.raises(program.Refused, match=f"{tmp_path}/{name}: there already"):
        program.note(record, delivery(tmp_path, "a"))


def test_a_removed_tree_is_gone_even_if_a_removal_was_cut_off(
    program: SimpleNamespace, tmp_path: Path
) -> None:
    for name in ("tree", ".tree-removed"):
        (tmp_path / name / "deep").mkdir(parents=True)
    for _ in range(2):
        program.remove_trees([str(tmp_path / "tree")])
        assert list(tmp_path.iterdir()) == []


def test_a_copy_has_the_mode_and_dates_of_the_original(
    program: SimpleNamespace, tmp_path: Path
) -> None:
    source = tmp_path / "a"
    source.write_text("content")
    source.chmod(0o640)
    (tmp_path / "b.new").write_text("what a killed run left")
    program.copy(str(source), str(tmp_path / "b"))
    assert (tmp_path / "b").read_text() == "content"
    assert (tmp_path / "b").stat().st_mode == source.stat().st_mode
    assert (tmp_path / "b").stat().st_mtime_ns == source.stat().st_mtime_ns


# ---- ready ---------------------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts a TLS server with a leaf certificate; returns its port."""
    servers: list[socket.socket] = []

    def start(leaf: Leaf, ca: str, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> int:
        pair = tmp_path / "pair.pem"
        pair.write_text(leaf.certificate + leaf.key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = newest
        context.load_cert_chain(pair)
        context.load_verify_locations(cadata=ca)
        # As the exporter does: who has no certificate is turned away, but sees the server's.
        context.verify_mode = ssl.CERT_REQUIRED
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def answer() -> None:
            try:
                connection, _ = server.accept()
                context.wrap_socket(connection, server_side=True).close()
            except OSError:
                return

        threading.Thread(target=answer, daemon=True).start()
        return server.getsockname()[1]

    yield start
    for server in servers:
        server.close()


def test_ready_is_whoever_shows_a_certificate_of_the_ca_with_the_name(
    program: SimpleNamespace,
    serve: Callable[..., int],
    authority: Authority,
    tmp_path: Path,
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text(authority.certificate)
    port = serve(authority.leaf(NAME), authority.certificate)
    program.ready("127.0.0.1", str(port), NAME, str(ca))


@pytest.mark.parametrize(
    ("name", "other_ca", "newest", "words"),
    [
        (SLAVE, False, ssl.TLSVersion.TLSv1_3, "Hostname mismatch"),
        (NAME, True, ssl.TLSVersion.TLSv1_3, "certificate verify failed"),
        (NAME, False, ssl.TLSVersion.TLSv1_2, "protocol version"),
    ],
)
def test_nobody_else_is(
    program: SimpleNamespace,
    serve: Callable[..., int],
    authority: Authority,
    tmp_path: Path,
    name: str,
    other_ca: bool,
    newest: ssl.TLSVersion,
    words: str,
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text((Authority() if other_ca else authority).certificate)
    port = serve(authority.leaf(NAME), authority.certificate, newest)
    with pytest.raises(program.Refused, match=f"as {name}: .*{words}"):
        program.ready("127.0.0.1", str(port), name, str(ca))


def test_who_does_not_listen_is_not_ready(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text(authority.certificate)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = run(["ready", "127.0.0.1", str(port), NAME, str(tmp_path / "ca.pem")])
    assert done.returncode == 1
    assert "Connection refused" in done.stderr


# ---- check-config, with the real exporter --------------------------------------------------------


@pytest.fixture(scope="session")
def exporter(tool_image: ToolImage) -> Path:
    from sandbox.releases import tool

    assert tool_image.layers
    return tool("node_exporter")


@pytest.fixture(scope="session")
def tls_folder(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Path:
    """The test's configurations, and the files that they name."""
    folder = tmp_path_factory.mktemp("web")
    shutil.copytree(CONFIGS, folder, dirs_exist_ok=True)
    leaf = authority.leaf(NAME)
    (folder / "server.crt").write_text(leaf.certificate)
    (folder / "server.key").write_text(leaf.key)
    (folder / "other.key").write_text(authority.leaf(NAME).key)
    (folder / "ca.pem").write_text(authority.certificate)
    return folder


def check_config(exporter: Path, config: Path) -> subprocess.CompletedProcess[str]:
    done = run(["check-config", str(exporter), str(config)])
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(config) not in process.read_text(), "the exporter still runs"
        except OSError:
            continue  # It just ended.
    return done


def named(pattern: str) -> list[Path]:
    found = sorted(CONFIGS.glob(pattern))
    assert found
    return found


@pytest.mark.machines
@pytest.mark.parametrize("config", named("*.good.yml"), ids=lambda path: path.name)
def test_a_good_configuration_is_accepted(exporter: Path, tls_folder: Path, config: Path) -> None:
    done = check_config(exporter, tls_folder / config.name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.machines
@pytest.mark.parametrize("config", named("*.bad.yml"), ids=lambda path: path.name)
def test_a_bad_configuration_is_refused_in_the_exporters_own_words(
    exporter: Path, tls_folder: Path, config: Path
) -> None:
    # Each says in its first line what it is refused with.
    words = config.read_text().splitlines()[0].partition("# Refused with: ")[2]
    assert words
    done = check_config(exporter, tls_folder / config.name)
    assert done.returncode == 1
    assert words in done.stderr
    assert "PRIVATE KEY" not in done.stdout + done.stderr


@pytest.mark.machines
def test_a_configuration_that_is_not_there_is_refused(exporter: Path, tmp_path: Path) -> None:
    done = check_config(exporter, tmp_path / "none.yml")
    assert done.returncode == 1
    assert "no such file" in done.stderr


@pytest.mark.machines
def test_an_exporter_is_gone_when_its_check_is_killed(tls_folder: Path, tmp_path: Path) -> None:
    # One that never says anything: the check would wait for it.
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\necho $$ >$0.pid\nexec sleep 60\n")
    silent.chmod(0o755)
    argv = [sys.executable, str(PROGRAM), "check-config", str(silent), str(tls_folder / "x")]
    with subprocess.Popen(argv) as check:
        pid = wait_for(tmp_path / "silent.pid")
        check.kill()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        threading.Event().wait(0.05)
    pytest.fail(f"process {pid} still runs")


def wait_for(file: Path) -> str:
    for _ in range(100):
        if file.exists() and file.read_text().strip():
            return file.read_text().strip()
        threading.Event().wait(0.05)
    return pytest.fail(f"{file} did not appear")


# ---- one at a time -------------------------------------------------------------------------------


def test_what_was_started_under_the_lock_holds_it_on(
    program: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # runpy has copied the names: the functions look theirs up here.
    names = program.install.__globals__
    monkeypatch.setitem(names, "LOCK", tmp_path / "lock")
    monkeypatch.setitem(names, "ASIDE", tmp_path / "aside")
    monkeypatch.setitem(names, "LOCK_SECONDS", 0)
    with program.locked():
        left = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with pytest.raises(program.Refused, match=f"process {os.getpid()} is"), program.locked():
            pass
    finally:
        left.kill()
        left.wait()
    with program.locked():
        pass

"""existing-master: its text edits judged by the real promtool, all of it on a real Prometheus.

Signals to a unit, SSH and a slave of our own are shown on booted machines (tests/sandbox).
"""

from __future__ import annotations

import ast
import base64
import contextlib
import http.server
import itertools
import json
import os
import runpy
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hostfiles import existing_master, prometheus
from hostfiles.model import ExistingMaster, ExistingMasterSecrets, FederatedSite
from hostfiles.templates import FOLDER
from tests.hostfiles.conftest import Authority, ToolImage

PROGRAM = FOLDER / "existing-master"
PASSWORD = "correct-horse-battery-staple"
OWNER = "prometheus-federation/test"


@pytest.fixture(scope="session")
def program() -> SimpleNamespace:
    """The program's functions."""
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


def site(name: str = "dublin", **change: Any) -> FederatedSite:
    default = FederatedSite(
        site=name,
        host="localhost",
        port=9095,
        user="prometheus-admin",
        match=('{job="CoreSystems"}',),
        scrape_interval="1s",
        sample_limit=1234,
    )
    return replace(default, **change)


def master(authority: Authority, *sites: FederatedSite, **change: Any) -> ExistingMaster:
    default = ExistingMaster(
        owner=OWNER,
        config_file="/etc/prometheus/prometheus.yml",
        run_as="0",
        promtool="promtool",
        url="http://127.0.0.1:9090",
        api_ca="",
        reload="http",
        unit="prometheus.service",
        ca_bundle=authority.certificate,
        sites=sites,
    )
    return replace(default, **change)


@pytest.fixture(scope="session")
def secrets(authority: Authority) -> ExistingMasterSecrets:
    leaf = authority.leaf("prometheus.example.org")
    return ExistingMasterSecrets(leaf=leaf, site_passwords={"dublin": PASSWORD})


# ---- the delivery --------------------------------------------------------------------------------


def test_it_is_written_in_python_3_9_and_an_older_one_gets_far_enough_to_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = PROGRAM.read_text()
    ast.parse(source, feature_version=(3, 6))
    assert "import annotations" not in source
    monkeypatch.setattr(sys, "version_info", (3, 8, 10))
    with pytest.raises(SystemExit, match=r"3\.9 is needed: .* `access`"):
        exec(compile(source, "existing-master", "exec"), {"__name__": "__main__"})  # noqa: S102


@pytest.mark.parametrize("argv", [[], ["install"], ["remove"], ["remove", "a", "b"], ["destroy"]])
def test_anything_else_is_answered_with_the_usage(argv: list[str]) -> None:
    done = subprocess.run([sys.executable, PROGRAM, *argv], capture_output=True, text=True)
    assert done.returncode == 2
    assert "remove OWNER" in done.stderr


def test_a_job_has_what_the_settings_of_its_slave_say(
    authority: Authority, secrets: ExistingMasterSecrets
) -> None:
    told = json.loads(existing_master.delivery(master(authority, site()), secrets))
    (job,) = yaml.safe_load(told["sites"]["dublin"]["content"])["scrape_configs"]
    assert job["params"] == {"match[]": ['{job="CoreSystems"}', prometheus.ALWAYS_FEDERATED]}
    assert job["sample_limit"] == 1234
    assert job["honor_labels"]
    assert "insecure_skip_verify" not in job["tls_config"]
    named = {
        job["basic_auth"]["password_file"],
        *(value for key, value in job["tls_config"].items() if key.endswith("_file")),
    }
    assert named == {f"files/{name}" for name in told["files"]}
    assert PASSWORD not in told["sites"]["dublin"]["content"]


def test_another_secret_is_in_another_file(
    authority: Authority, secrets: ExistingMasterSecrets
) -> None:
    def names(changed: ExistingMasterSecrets) -> set[str]:
        return set(
            json.loads(existing_master.delivery(master(authority, site()), changed))["files"]
        )

    before = names(secrets)
    other_leaf = replace(secrets, leaf=authority.leaf("prometheus.example.org"))
    assert len(before & names(other_leaf)) == 2, "certificate and key change together"
    other_password = replace(secrets, site_passwords={"dublin": f"{PASSWORD}2"})
    assert len(before & names(other_password)) == 3


def test_secrets_show_in_no_representation(secrets: ExistingMasterSecrets) -> None:
    shown = repr(replace(secrets, api_password="another-secret"))
    assert PASSWORD not in shown
    assert "another-secret" not in shown
    assert "PRIVATE KEY" not in shown


# ---- the text of prometheus.yml ------------------------------------------------------------------

OURS = "scrape_config_files: [federate.d/*.yml]  # added by prometheus-federation, and removed"
JOBS = 'scrape_configs:\n- job_name:   "own"   # odd\n  static_configs: [{targets: [a:1]}]\n'
# A text, and what the new one has in it.
SOUND = {
    "empty": ("", OURS),
    "comments alone": ("# nothing yet\n", OURS),
    "no such key": (JOBS, f"\n{OURS}"),
    "no line end at the end": (JOBS.rstrip("\n"), f"\n{OURS}"),
    "blank lines at the end": (f"{JOBS}\n\n   \n", OURS),
    "a comment at the end": (f"{JOBS}# bye", f"# bye\n{OURS}"),
    "windows": (JOBS.replace("\n", "\r\n"), f"\r\n{OURS}"),
    "a mark of the byte order": (f"\ufeff{JOBS}", OURS),
    "a document's begin": (f"---\n{JOBS}", OURS),
    "the key in a comment": (f"# scrape_config_files: [federate.d/*.yml]\n{JOBS}", OURS),
    "the key in an indented comment": (f"global:\n  # scrape_config_files:\n{JOBS}", OURS),
    "the key's name in a text": (JOBS.replace("own", "scrape_config_files: x"), OURS),
    "a list": (
        f"scrape_config_files:\n  - jobs.d/*.yml\n{JOBS}",
        "scrape_config_files:\n  - federate.d/*.yml  # added",
    ),
    "a list that is not indented": (
        f"scrape_config_files:   # see wiki\n# first\n\n- 'jobs.d/*.yml'\n{JOBS}",
        "# first\n\n- federate.d/*.yml  # added",
    ),
    "a list of windows": (
        f"scrape_config_files:\r\n    - jobs.d/*.yml\r\n{JOBS}",
        "\r\n    - federate.d/*.yml  # added by prometheus-federation, and removed with it\r\n",
    ),
    "an empty value": (f"scrape_config_files:\n{JOBS}", "scrape_config_files:\n  - federate.d"),
    "an empty value at the end": (f"{JOBS}scrape_config_files:", "files:\n  - federate.d"),
    "a list in brackets": (
        f"scrape_config_files : [ jobs.d/*.yml ]  # [x]\n{JOBS}",
        "scrape_config_files : [federate.d/*.yml,  jobs.d/*.yml ]  # [x]",
    ),
    "empty brackets": (f"scrape_config_files: []\n{JOBS}", "files: [federate.d/*.yml]\n"),
}
COVERED = [
    "scrape_config_files: [federate.d/*.yml]\n",
    "scrape_config_files:\n- 'jobs.d/*.yml'\n- \"federate.d/*\"\n",
    '"scrape_config_files": [federate.d/*.yml]\n',
    "{scrape_config_files: [federate.d/*.yml]}\n",
    "scrape_config_files: [HERE/federate.d/*.yml]\n",
    "  scrape_config_files:\n    - federate.d/*.yml\n",
]
UNSOUND = [
    "{global: {scrape_interval: 15s}}\n",
    '"scrape_config_files": [jobs.d/*.yml]\n',
    "scrape_config_files: [\n  jobs.d/*.yml ]\n",
    "scrape_config_files: &name\n  - jobs.d/*.yml\n",
    "scrape_config_files: null\n",
    "  global:\n    scrape_interval: 15s\n",
    "global: {}\n---\nglobal: {}\n",
    "global: {}\n...\n",
]


@dataclass(kw_only=True)
class Judge:
    """promtool, for a text in the place of prometheus.yml."""

    program: SimpleNamespace
    prometheus: Any
    folder: Path

    def reads(self, text: str) -> bool:
        return self.program.reads(self.prometheus, text)


@pytest.fixture
def judge(
    program: SimpleNamespace,
    tool_image: ToolImage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Judge:
    from sandbox.releases import tool

    assert tool_image.layers
    # runpy has copied the names: the functions look theirs up here.
    monkeypatch.setitem(program.reads.__globals__, "ROOT", tmp_path)
    (tmp_path / "undo.json").write_text('{"ours": []}')
    folder = tmp_path / "etc"
    (folder / "jobs.d").mkdir(parents=True)
    server = {"config_file": f"{folder}/prometheus.yml", "promtool": str(tool("promtool"))}
    prometheus = program.Prometheus({**server, "url": "http://127.0.0.1:1", "ca": ""})
    return Judge(program=program, prometheus=prometheus, folder=folder)


@pytest.mark.machines
@pytest.mark.parametrize("name", SOUND)
def test_one_addition_is_made_and_taken_away_again(judge: Judge, name: str) -> None:
    text, expected = SOUND[name]
    assert not judge.reads(text)
    new = judge.program.extended(judge.prometheus, text)
    assert judge.reads(new)
    assert expected in new
    # Nothing but an addition: without it, it is the old text.
    added = len(new) - len(text)
    assert added > 0
    at = next(n for n in range(len(new)) if new[:n] + new[n + added :] == text)
    assert "federate.d/*.yml" in new[at : at + added]
    # Edited by its owner meanwhile, before and after it.
    edited = f"# mine\n{new}" if not text.startswith("\ufeff") else new
    left = judge.program.without_line(edited)
    assert "federate.d" not in left or "federate.d" in text
    assert left.removeprefix("# mine\n").rstrip("\r\n") == text.rstrip("\r\n")
    # And gone by his own hand.
    assert judge.program.without_line(text) == text


def test_an_entry_that_was_added_to_ours_stays(program: SimpleNamespace) -> None:
    new = program.with_line(JOBS).replace("*.yml]", "*.yml, mine/*.yml]")
    assert program.without_line(new) == f"{JOBS}scrape_config_files: [mine/*.yml]\n"


@pytest.mark.machines
@pytest.mark.parametrize("text", COVERED)
def test_a_file_that_reads_it_already_is_seen_to(judge: Judge, text: str) -> None:
    assert judge.reads(text.replace("HERE", str(judge.folder)))


@pytest.mark.machines
@pytest.mark.parametrize("text", UNSOUND)
def test_what_cannot_be_added_to_safely_is_refused_with_the_line_to_add(
    judge: Judge, text: str
) -> None:
    assert not judge.reads(text)
    with pytest.raises(judge.program.Refused, match=r"by hand[^\n]*\nscrape_config_files: \[fed"):
        judge.program.extended(judge.prometheus, text)


@pytest.mark.machines
def test_what_promtool_refuses_as_it_is_is_told_by_its_own_path(judge: Judge) -> None:
    with pytest.raises(judge.program.Refused) as told:
        judge.reads("rule_files: 7\n")
    assert f"{judge.folder}/prometheus.yml" in str(told.value)
    assert list(judge.folder.parent.glob(".etc*")) == [], "the staged copy is gone"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-11-21T09:25:40.123456789Z", 1795253140.123456),
        ("2026-11-21T10:25:40+01:00", 1795253140.0),
        ("0001-01-01T00:00:00Z", 0.0),
    ],
)
def test_times_of_prometheus(program: SimpleNamespace, text: str, seconds: float) -> None:
    assert program.parse_time(text) == pytest.approx(max(seconds, -62135596800), abs=1e-3) or (
        seconds == 0.0 and program.parse_time(text) <= 0
    )


@pytest.mark.parametrize("version", ["2.42.0", "1.8.2", "0.20.0"])
def test_a_prometheus_without_scrape_config_files_is_refused(
    program: SimpleNamespace, version: str
) -> None:
    with pytest.raises(program.Refused, match=r"came with 2\.43: upgrade it, or take `access` out"):
        program.parse_version(version, "promtool")
    assert program.parse_version("2.43.0+ds1", "promtool") == (2, 43)


def test_an_older_one_gets_no_key_that_it_refuses(program: SimpleNamespace) -> None:
    job = "scrape_configs:\n- job_name: a\n  track_timestamps_staleness: true\n  scheme: https\n"
    assert program.without_newer_keys(job, (2, 48)).decode() == job
    assert b"track" not in program.without_newer_keys(job, (2, 47))


# ---- a real Prometheus ---------------------------------------------------------------------------


class Slave(http.server.ThreadingHTTPServer):
    """Something that is federated: TLS, a client certificate of the CA, a password."""

    daemon_threads = True

    def __init__(self, authority: Authority, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Federate)
        leaf = authority.leaf("localhost")
        (folder / "slave.pem").write_text(leaf.certificate + leaf.key)
        (folder / "ca.pem").write_text(authority.certificate)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(folder / "slave.pem")
        self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever comes without a certificate is no news."""


class _Federate(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        pair = base64.b64encode(f"prometheus-admin:{PASSWORD}".encode()).decode()
        good = self.headers.get("Authorization") == f"Basic {pair}"
        self.send_response(200 if good else 401)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(b'core_up{job="CoreSystems"} 1\n' if good else b"")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's own name
        """Nothing."""


class _Page(http.server.BaseHTTPRequestHandler):
    """Answers with success and a page, or with less than it promises."""

    def do_GET(self) -> None:
        page = b"<html>Log in</html>"
        cut = self.path.startswith("/cut")
        self.send_response(200)
        self.send_header("Content-Length", str(len(page) + cut))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's own name
        """Nothing."""


@pytest.mark.parametrize(
    ("path", "words"),
    [("", "answers, but not as Prometheus does"), ("/cut", "no answer from Prometheus at")],
)
def test_an_answer_that_is_none_of_prometheus_is_refused_with_what_to_look_at(
    program: SimpleNamespace, path: str, words: str
) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}{path}"
            there = {"config_file": "/none/prometheus.yml", "url": url, "ca": "", "username": ""}
            with pytest.raises(program.Refused) as refusal:
                program.Prometheus(there).data("status/buildinfo")
        finally:
            server.shutdown()
            thread.join()
    assert words in str(refusal.value)
    assert url in str(refusal.value)


ODD = """\
# Ours since 2019.   Ask before you touch it!
global: {scrape_interval: 1s,   scrape_timeout: 1s}


scrape_configs:
-   job_name: "own"     # itself
    static_configs:
    - targets: ['127.0.0.1:PORT']
# The end, without a line's"""


@dataclass(kw_only=True)
class Hub:
    """A Prometheus of somebody else's, and the program with a root of its own."""

    folder: Path
    port: int
    slave: Slave
    authority: Authority
    secrets: ExistingMasterSecrets
    process: subprocess.Popen[bytes] | None = None
    told: list[str] = field(default_factory=list)

    @property
    def etc(self) -> Path:
        return self.folder / "etc/prometheus"

    def delivery(self, *sites: FederatedSite, password: str = PASSWORD, **change: Any) -> str:
        from sandbox.releases import tool

        sites = sites or (site(),)
        here = master(
            self.authority,
            *(replace(one, port=self.slave.server_address[1]) for one in sites),
            config_file=str(self.etc / "prometheus.yml"),
            promtool=str(tool("promtool")),
            url=f"http://127.0.0.1:{self.port}",
        )
        passwords = {one.site: password for one in sites}
        text = existing_master.delivery(
            replace(here, **change), replace(self.secrets, site_passwords=passwords)
        )
        text = text.replace("/opt/", f"{self.folder}/opt/").replace("/run/lock", str(self.folder))
        return text.replace("/usr/local/sbin:", f"{self.folder}/stub:/usr/local/sbin:")

    def start(self, delivery: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["sh", "-c", existing_master.INSTALL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        process.stdin.write(delivery)
        process.stdin.close()
        process.stdin = None
        return process

    def install(self, delivery: str, status: int = 0) -> str:
        process = self.start(delivery)
        out, err = process.communicate(timeout=90)
        assert process.returncode == status, out + err
        assert "PRIVATE KEY" not in out + err
        assert PASSWORD not in out + err
        return out + err

    def remove(self, owner: str = OWNER, status: int = 0) -> str:
        path = self.folder / "opt/federation-master/bin/existing-master"
        done = subprocess.run(
            [sys.executable, path, "remove", owner], capture_output=True, text=True, timeout=90
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def snapshot(self) -> dict[str, Any]:
        """All that could be touched: content, mode, owner, date, attributes."""
        found = {}
        for path in sorted([*self.folder.glob("etc/**/*"), *self.folder.glob("opt/**/*")]):
            status = path.lstat()
            found[str(path)] = (status.st_mode, status.st_uid, status.st_gid) + (
                (path.read_bytes(), status.st_mtime_ns, attributes(path)) if path.is_file() else ()
            )
        return found

    def api(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=5) as answer:
            return answer.read()

    def query(self, promql: str) -> list[Any]:
        path = f"api/v1/query?query={urllib.parse.quote(promql)}"
        return json.loads(self.api(path))["data"]["result"]

    def reloads(self) -> str:
        found = self.api("metrics").decode()
        name = "prometheus_config_last_reload_success_timestamp_seconds "
        return next(line for line in found.splitlines() if line.startswith(name))

    def config(self) -> str:
        return (self.etc / "prometheus.yml").read_text()

    def wait(self, promql: str) -> list[Any]:
        """Its targets are found within seconds of its start and of a reload."""
        found: list[Any] = []
        for _ in range(200):
            if found := self.query(promql):
                break
            time.sleep(0.05)
        assert found, promql
        return found


def attributes(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path)}


@pytest.fixture
def hub(
    authority: Authority,
    secrets: ExistingMasterSecrets,
    tool_image: ToolImage,
    tmp_path: Path,
) -> Iterator[Hub]:
    from sandbox.releases import tool

    assert tool_image.layers
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    slave = Slave(authority, tmp_path)
    one = Hub(folder=tmp_path, port=port, slave=slave, authority=authority, secrets=secrets)
    one.etc.mkdir(parents=True)
    config = one.etc / "prometheus.yml"
    config.write_text(ODD.replace("PORT", str(port)))
    os.chown(config, 1234, 4321)
    config.chmod(0o604)
    os.setxattr(config, "user.note", b"kept")
    argv = [str(tool("prometheus")), f"--config.file={config}", "--web.enable-lifecycle"]
    argv += [f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        one.process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                if one.api("-/ready"):
                    break
            time.sleep(0.05)
        yield one
    finally:
        one.process.kill()
        one.process.wait()
        slave.shutdown()
        slave.server_close()


@pytest.mark.machines
def test_it_federates_and_is_left_as_it_was(hub: Hub) -> None:
    hub.wait("up")
    before, began = hub.snapshot(), time.time()
    told = hub.install(hub.delivery())
    assert "reloaded" in told
    assert hub.config() == f"{ODD}\n{OURS} with it\n".replace("PORT", str(hub.port))
    assert hub.query('core_up{site="dublin"}')
    (key,) = hub.etc.glob("federate.d/files/*.key")
    assert key.stat().st_mode & 0o777 == 0o640
    status = (hub.etc / "prometheus.yml").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1234, 4321, 0o604)
    assert attributes(hub.etc / "prometheus.yml") == before[str(hub.etc / "prometheus.yml")][5]

    there, reloads = hub.snapshot(), hub.reloads()
    assert hub.install(hub.delivery()) == "no changes\n"
    assert hub.snapshot() == there
    assert hub.reloads() == reloads

    assert "jobs of prometheus-federation/test already" in hub.install(
        hub.delivery(owner="prometheus-federation/other"), status=1
    )
    assert "already" in hub.remove("prometheus-federation/other", status=1)
    assert hub.snapshot() == there

    assert hub.remove() == "removed\n"
    assert hub.snapshot() == before
    assert hub.reloads() != reloads
    assert not json.loads(hub.api("api/v1/targets?scrapePool=federate-dublin"))["data"][
        "activeTargets"
    ]
    # Its own job was scraped every second all the while.
    (own,) = hub.query(f'up{{job="own"}}[{int(time.time() - began)}s]')
    times = [moment for moment, _ in own["values"]]
    assert {value for _, value in own["values"]} == {"1"}
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 1.9


@pytest.mark.machines
def test_sites_come_and_go_and_a_wrong_password_changes_nothing(hub: Hub) -> None:
    before = hub.snapshot()
    told = hub.install(hub.delivery(password="not-the-one"), status=1)
    assert "federate-dublin did not come up" in told
    assert "server returned HTTP status 401 Unauthorized" in told
    assert "as it was before" in told
    assert hub.snapshot() == before

    hub.install(hub.delivery())
    there = hub.snapshot()
    told = hub.install(hub.delivery(site(), site("osaka"), password="not-the-one"), status=1)
    assert "401 Unauthorized" in told
    assert "What was there before is back in force" in told
    after = hub.snapshot()
    changed = {path for path in there.keys() | after.keys() if there.get(path) != after.get(path)}
    assert {Path(path).name for path in changed} <= {"undo.json", "dublin.yml"}
    assert (hub.etc / "federate.d/dublin.yml").read_text().count("job_name") == 1
    time.sleep(1.5)
    assert hub.query('up{job="federate",site="dublin"} == 1')

    hub.install(hub.delivery(site(), site("osaka")))
    assert hub.query('core_up{site="osaka"}')
    assert "removed" in hub.install(hub.delivery(site("osaka")))
    assert not (hub.etc / "federate.d/dublin.yml").exists()
    assert len(list(hub.etc.glob("federate.d/files/*"))) == 4
    hub.remove()
    assert hub.snapshot() == before


@pytest.mark.machines
def test_what_its_owner_edited_since_stays(hub: Hub) -> None:
    before = hub.config()
    hub.install(hub.delivery())
    with (hub.etc / "prometheus.yml").open("a") as file:
        file.write("# mine\n")
    (hub.etc / "federate.d/mine.yml").write_text("scrape_configs: []\n")
    assert hub.install(hub.delivery()) == "no changes\n"
    assert "not of our making" in hub.remove()
    assert hub.config() == f"{before}\n# mine\n"
    assert [path.name for path in hub.etc.glob("federate.d/*")] == ["mine.yml"]


@pytest.mark.machines
def test_a_file_of_the_same_name_or_a_job_of_the_same_name_is_left_alone(hub: Hub) -> None:
    (hub.etc / "federate.d").mkdir()
    (hub.etc / "federate.d/dublin.yml").write_text("scrape_configs: []\n")
    before = hub.snapshot()
    assert "dublin.yml is there already" in hub.install(hub.delivery(), status=1)
    assert hub.snapshot() == before
    (hub.etc / "federate.d/dublin.yml").unlink()
    config = hub.etc / "prometheus.yml"
    config.write_text(hub.config().replace('"own"', '"federate-dublin"'))
    before = hub.snapshot()
    assert "multiple scrape configs" in hub.install(hub.delivery(), status=1)
    assert hub.snapshot() == before


@pytest.mark.machines
def test_it_says_what_it_needs_and_touches_nothing(hub: Hub, tmp_path: Path) -> None:
    before = hub.snapshot()
    old = tmp_path / "promtool-2.42"
    old.write_text("#!/bin/sh\necho 'promtool, version 2.42.0 (branch: HEAD)'\n")
    old.chmod(0o755)
    refused: dict[str, dict[str, Any]] = {
        "is version 2.42, and scrape_config_files came with 2.43": {"promtool": str(old)},
        "set existingMaster.promtool": {"promtool": "no-such-promtool"},
        "cannot be read: set existingMaster.configFile": {"config_file": "/etc/none/p.yml"},
        "set existingMaster.runAs": {"run_as": "nobody-of-that-name"},
        "no answer from Prometheus": {"url": "http://127.0.0.1:1"},
        "--web.external-url": {"url": f"http://127.0.0.1:{hub.port}/prometheus"},
        "set existingMaster.unit": {"reload": "signal", "unit": "none.service"},
    }
    for words, change in refused.items():
        assert words in hub.install(hub.delivery(**change), status=1)
        assert hub.snapshot() == before


@pytest.mark.machines
def test_it_reloads_by_a_signal_to_the_process_of_a_unit(hub: Hub) -> None:
    hub.wait("up")
    before = hub.snapshot()
    assert hub.process
    stub = hub.folder / "stub/systemctl"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\n[ "$4" = odd.service ] && echo {hub.process.pid}\n')
    stub.chmod(0o755)
    hub.install(hub.delivery(reload="signal", unit="odd.service"))
    assert hub.query('core_up{site="dublin"}')
    hub.remove()
    assert hub.snapshot() == before


@pytest.mark.machines
def test_killed_at_any_moment_the_next_run_finishes(hub: Hub) -> None:
    hub.wait("up")
    before = hub.snapshot()
    interrupted = 0
    for number in range(6):
        process = hub.start(hub.delivery())
        time.sleep(0.15 + 0.2 * number)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        interrupted += process.returncode != 0 and (hub.folder / "opt").exists()
        assert hub.query("up")
        if number % 2:
            hub.install(hub.delivery())
            assert hub.query('up{job="federate"}')
        if hub.folder.joinpath("opt/federation-master").exists():
            hub.remove()
        shutil.rmtree(hub.folder / "opt", ignore_errors=True)
        left = hub.snapshot()
        if number % 2 == 0:
            # What was staged beside it, for the next run to clear away.
            for path in [path for path in left if "/.prometheus" in path]:
                del left[path]
        assert left == before
    assert interrupted, "none of them was in the middle"

"""Program releases for the sandbox's machines, and the server that they download them from.

The pinned official tarball where the release host can be reached, else the same program as
Debian builds it, or as Go builds it here where Debian has none, put into a tarball of the official
layout. Which of them it is, is said in `LocalRelease.origin`. Once they are in the cache no
network is needed.
"""

import fcntl
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import httpx

from sandbox.host import Progress, SandboxError, kill_with_parent, run, wait_until
from sandbox.image import KEYRING, mirror, proxy_options
from sandbox.plan import CACHE_DIR, NETNS_DIR, Plan

RELEASES_DIR = CACHE_DIR / "releases"
RELEASE_HOST = "releases.example.net"
# Debian's next release: its builds need no library that Debian 12 and 13 lack.
FALLBACK_SUITE = "forky"
PROBE_SECONDS = 3

# Program → Debian packages, and where the files of the official layout are in them.
_DEBIAN: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "prometheus": (
        ("prometheus", "promtool"),
        {"prometheus": "usr/bin/prometheus", "promtool": "usr/bin/promtool"},
    ),
    "node_exporter": (
        ("prometheus-node-exporter",),
        {"node_exporter": "usr/bin/prometheus-node-exporter"},
    ),
    "alertmanager": (
        ("prometheus-alertmanager",),
        {"alertmanager": "usr/bin/prometheus-alertmanager", "amtool": "usr/bin/amtool"},
    ),
    "pebble": (("pebble",), {"pebble": "usr/bin/pebble"}),
}

# What Debian's builds read from the file system, and the official ones have within them.
_DEBIAN_DATA = {"alertmanager": "usr/share/prometheus/alertmanager"}
_DATA = RELEASES_DIR / "data"


@dataclass(frozen=True, kw_only=True)
class _GoModule:
    """Where Go finds a program's sources. `programs` are packages in it, `stamp` a variable of its
    version. https://go.dev/ref/mod"""

    path: str
    programs: dict[str, str]
    stamp: str


_GO = {
    "prometheus": _GoModule(
        path="github.com/prometheus/prometheus",
        programs={"prometheus": "/cmd/prometheus", "promtool": "/cmd/promtool"},
        stamp="github.com/prometheus/common/version.Version",
    ),
    "alertmanager": _GoModule(
        path="github.com/prometheus/alertmanager",
        programs={"alertmanager": "/cmd/alertmanager", "amtool": "/cmd/amtool"},
        stamp="github.com/prometheus/common/version.Version",
    ),
    "oauth2-proxy": _GoModule(
        path="github.com/oauth2-proxy/oauth2-proxy/v7",
        programs={"oauth2-proxy": ""},
        stamp="github.com/oauth2-proxy/oauth2-proxy/v7/pkg/version.VERSION",
    ),
}
# Where https://go.dev/doc/install puts it.
_GO_BIN = "/usr/local/go/bin"


@dataclass(frozen=True, kw_only=True)
class Pin:
    """The official release that is wanted: its tarball's address and sha256 (hex)."""

    name: str
    version: str
    sha256: str
    url: str


@dataclass(frozen=True, kw_only=True)
class LocalRelease:
    """A tarball in the cache. `origin` says in words where its program comes from."""

    name: str
    version: str
    path: Path
    sha256: str
    origin: str

    @property
    def url(self) -> str:
        """Where the machines download it from."""
        return f"http://{RELEASE_HOST}/{self.path.name}"


def ensure_releases(progress: Progress, pins: Sequence[Pin]) -> dict[str, LocalRelease]:
    """Return a release for each pin, by name, filling the cache where it is missing.

    Raises SandboxError when neither the official release nor Debian's build can be had, or when
    a downloaded tarball has not the pinned sha256.
    """
    RELEASES_DIR.mkdir(parents=True, exist_ok=True)
    with (RELEASES_DIR / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        index = RELEASES_DIR / f"index-{_digest(pins)}.json"
        if found := _read_index(index):
            return found
        _remove_leftovers()
        with progress("Fetching the program releases"):
            releases = _fetch_official(pins) or _stand_ins(pins)
            for release in releases:
                _unpack_tools(release)
            _write_index(index, releases)
        return {release.name: release for release in releases}


def debian_build(progress: Progress, name: str, suite: str) -> LocalRelease:
    """Return a program as a suite of Debian builds it: another version, for upgrades to be tried.

    Raises SandboxError where it cannot be had.
    """
    RELEASES_DIR.mkdir(parents=True, exist_ok=True)
    with (RELEASES_DIR / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        index = RELEASES_DIR / f"index-{name}-{suite}.json"
        if found := _read_index(index):
            return found[name]
        _remove_leftovers()
        with progress(f"Fetching {name} of Debian {suite}"):
            work = RELEASES_DIR / "tmp-debian"
            _download_debian(work, _DEBIAN[name][0], suite)
            release = _repackage_one(name, work, suite)
            shutil.rmtree(work)
            _write_index(index, [release])
        return release


def add(name: str, version: str, files: dict[str, Path], origin: str) -> LocalRelease:
    """Put a release that is made of these programs into the cache."""
    RELEASES_DIR.mkdir(parents=True, exist_ok=True)
    return _pack_release(name, version, files, origin)


def go_build(name: str, version: str) -> dict[str, Path]:
    """The programs of a release, built here from their Go module; kept in the cache.

    Without the web pages, if it has any. Raises SandboxError where there is no Go or no module.
    """
    module = _GO[name]
    folder = RELEASES_DIR / f"built-{name}-{version}"
    if not folder.exists():
        work = folder.with_name(f"tmp-{folder.name}")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        stamp = f"-s -w -X {module.stamp}={version}"
        build = ["build", "-mod=mod", "-trimpath", "-ldflags", stamp]
        for arguments in (
            ["mod", "init", "built"],
            ["get", f"{module.path}@{module_version(name, version)}"],
            *([*build, "-o", file, module.path + at] for file, at in module.programs.items()),
        ):
            go(work, *arguments)
        work.rename(folder)
    return {file: folder / file for file in module.programs}


def go(folder: Path, *arguments: str | Path) -> str:
    """Run this machine's Go in a folder and return what it printed.

    Raises SandboxError where there is no Go, or it fails.
    """
    path = f"{os.environ['PATH']}:{_GO_BIN}"
    if not shutil.which("go", path=path):
        raise SandboxError(
            "A release is out of reach, and there is no Go to build it.",
            "Connect this machine to the internet, or install Go: https://go.dev/doc/install",
        )
    environment = {**os.environ, "PATH": path, "CGO_ENABLED": "0"}
    argv = kill_with_parent(["go", "-C", folder, *arguments])
    return run(argv, env=environment, timeout=1800).stdout


def module_version(name: str, version: str) -> str:
    """The version of a program's Go module."""
    if name != "prometheus":
        return f"v{version}"
    # Prometheus's module is at 0.<major><minor, two digits>.<patch>.
    major, minor, patch = version.split(".")
    return f"v0.{major}{int(minor):02}.{patch}"


def tool(name: str) -> Path:
    """Return a program of the cached releases (promtool, amtool, prometheus…) to run here."""
    path = RELEASES_DIR / "tools" / name
    if not path.exists():
        raise SandboxError(
            f"'{name}' is not in the cache ({RELEASES_DIR}).", "Run `make up` or `make test` once."
        )
    return path


def debian_tool(progress: Progress, name: str) -> Path:
    """Return a program as Debian builds it, to run here, fetching it where it is missing."""
    if not (RELEASES_DIR / "tools" / name).exists():
        _unpack_tools(debian_build(progress, name, FALLBACK_SUITE))
    return tool(name)


def data_layers() -> tuple[Path, ...]:
    """Return what stands in for parts of official releases, as layers of a machine's image."""
    return (_DATA,) if _DATA.is_dir() else ()


def _digest(pins: Sequence[Pin]) -> str:
    text = json.dumps(sorted((pin.name, pin.version, pin.sha256) for pin in pins))
    return hashlib.sha256(f"2 {text}".encode()).hexdigest()[:12]


def _read_index(index: Path) -> dict[str, LocalRelease] | None:
    if not index.exists():
        return None
    rows = json.loads(index.read_text())
    releases = {row["name"]: LocalRelease(**{**row, "path": Path(row["path"])}) for row in rows}
    return releases if all(release.path.exists() for release in releases.values()) else None


def _write_index(index: Path, releases: Sequence[LocalRelease]) -> None:
    rows = [{**asdict(release), "path": str(release.path)} for release in releases]
    temporary = RELEASES_DIR / "tmp-index"
    temporary.write_text(json.dumps(rows, indent=2))
    temporary.rename(index)


def _remove_leftovers() -> None:
    for leftover in RELEASES_DIR.glob("tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _reachable(pin: Pin) -> bool:
    try:
        answer = httpx.head(pin.url, follow_redirects=True, timeout=PROBE_SECONDS)
    except (httpx.HTTPError, OSError):
        return False
    return answer.status_code == 200


def _fetch_official(pins: Sequence[Pin]) -> list[LocalRelease]:
    """Download every pin, or return nothing where any of them is out of reach."""
    with ThreadPoolExecutor(max_workers=max(1, len(pins))) as pool:
        if not all(pool.map(_reachable, pins)):
            return []
        return list(pool.map(_download, pins))


def _download(pin: Pin) -> LocalRelease:
    path = RELEASES_DIR / Path(httpx.URL(pin.url).path).name
    temporary = RELEASES_DIR / f"tmp-{path.name}"
    digest = hashlib.sha256()
    try:
        with (
            httpx.stream("GET", pin.url, follow_redirects=True, timeout=60) as answer,
            temporary.open("wb") as file,
        ):
            answer.raise_for_status()
            for chunk in answer.iter_bytes():
                digest.update(chunk)
                file.write(chunk)
    except httpx.HTTPError as error:
        raise SandboxError(f"Downloading {pin.url} failed: {error}.", "Try again.") from error
    if digest.hexdigest() != pin.sha256:
        raise SandboxError(
            f"{pin.url} has the sha256 {digest.hexdigest()}, and {pin.sha256} is pinned.",
            "Do not use that file. Check the pin against the project's own list of checksums.",
        )
    temporary.rename(path)
    return LocalRelease(
        name=pin.name,
        version=pin.version,
        path=path,
        sha256=pin.sha256,
        origin=f"official release {pin.version}",
    )


def _stand_ins(pins: Sequence[Pin]) -> list[LocalRelease]:
    packaged = [pin for pin in pins if pin.name in _DEBIAN]
    built = [_build(pin) for pin in pins if pin.name not in _DEBIAN]
    return [*(_repackage(packaged) if packaged else []), *built]


def _repackage(pins: Sequence[Pin]) -> list[LocalRelease]:
    work = RELEASES_DIR / "tmp-debian"
    packages = [package for pin in pins for package in _DEBIAN[pin.name][0]]
    _download_debian(work, packages, FALLBACK_SUITE)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        releases = list(pool.map(lambda pin: _repackage_one(pin.name, work, FALLBACK_SUITE), pins))
    shutil.rmtree(work)
    return releases


def _build(pin: Pin) -> LocalRelease:
    programs = go_build(pin.name, pin.version)
    return _pack_release(pin.name, pin.version, programs, "built from its Go module")


def _download_debian(work: Path, packages: Sequence[str], suite: str) -> None:
    """Let apt fetch the packages, its signature check included, away from this machine's apt."""
    for folder in ("lists/partial", "cache/archives/partial", "debs"):
        (work / folder).mkdir(parents=True)
    line = f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n"
    (work / "sources.list").write_text(line)
    proxies = (option.rstrip(";").split(" ", 1) for option in proxy_options())
    options = {
        "Dir::Etc::sourcelist": str(work / "sources.list"),
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": str(work / "lists"),
        "Dir::Cache": str(work / "cache"),
        "Acquire::Languages": "none",
        "Acquire::Check-Valid-Until": "false",
        # apt's own user may not enter our folder; the signature check is the same.
        "APT::Sandbox::User": "root",
        **{key: value.strip('"') for key, value in proxies},
    }
    flags = [flag for key, value in options.items() for flag in ("-o", f"{key}={value}")]
    script = 'set -e; cd "$1"; shift; apt-get -q "$@" update; apt-get -q "$@" download $PACKAGES'
    run(
        kill_with_parent(["sh", "-c", script, "sh", work / "debs", *flags]),
        env={**os.environ, "PACKAGES": " ".join(packages), "LC_ALL": "C.UTF-8"},
        timeout=300,
    )


def _repackage_one(name: str, work: Path, suite: str) -> LocalRelease:
    packages, files = _DEBIAN[name]
    root = work / name
    version = ""
    for package in packages:
        deb = next((work / "debs").glob(f"{package}_*.deb"))
        run(["dpkg-deb", "--extract", deb, root])
        version = version or run(["dpkg-deb", "--field", deb, "Version"]).stdout.strip()
    if data := _DEBIAN_DATA.get(name):
        shutil.copytree(root / data, _DATA / data, dirs_exist_ok=True)
    upstream = version.partition("-")[0].partition("+")[0]
    return _pack_release(
        name,
        upstream,
        {file: root / source for file, source in files.items()},
        f"repackaged from Debian {suite}'s {packages[0]} {version}",
    )


def _pack_release(name: str, version: str, files: dict[str, Path], origin: str) -> LocalRelease:
    top = f"{name}-{version}.linux-amd64"
    path = RELEASES_DIR / f"{top}.tar.gz"
    temporary = RELEASES_DIR / f"tmp-{path.name}"
    temporary.write_bytes(pack(top, files))
    temporary.rename(path)
    return LocalRelease(
        name=name,
        version=version,
        path=path,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        origin=origin,
    )


def pack(top: str, files: dict[str, Path]) -> bytes:
    """Make a gzipped tarball of programs under one folder: the same bytes on every run."""
    buffer = io.BytesIO()
    with (
        # A middling level: this is read back over a local link.
        gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=4, mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        folder = tarfile.TarInfo(top)
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        for name, source in sorted(files.items()):
            info = tarfile.TarInfo(f"{top}/{name}")
            info.mode, info.size = 0o755, source.stat().st_size
            with source.open("rb") as content:
                tar.addfile(info, content)
    return buffer.getvalue()


def _unpack_tools(release: LocalRelease) -> None:
    tools = RELEASES_DIR / "tools"
    tools.mkdir(exist_ok=True)
    with tarfile.open(release.path) as tar:
        for member in tar:
            # Executable files only: the official tarballs also carry samples and licences.
            if not member.isfile() or not member.mode & 0o100:
                continue
            content = tar.extractfile(member)
            if content is None:
                continue
            temporary = RELEASES_DIR / f"tmp-tool-{Path(member.name).name}"
            with temporary.open("wb") as file:
                shutil.copyfileobj(content, file)
            temporary.chmod(0o755)
            temporary.rename(tools / Path(member.name).name)


# Ends when its standard input does: it cannot outlive the process that holds the other end.
_SERVER = """
import functools, http.server, os, sys, threading
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[2])
server = http.server.ThreadingHTTPServer((sys.argv[1], 80), handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
print("ready", flush=True)
sys.stdin.buffer.read()
os._exit(0)
"""


class ReleaseServer:
    """Serves the cached tarballs on the sandbox's internet while its block runs.

    The network must have been applied: it listens on an address of the internet namespace.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ReleaseServer":
        netns = NETNS_DIR / self._plan.inet_netns
        log = self._plan.runtime_dir / "releases.log"
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [
                    *("nsenter", f"--net={netns}", sys.executable, "-I", "-c", _SERVER),
                    *(self._plan.releases_ip, str(RELEASES_DIR)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        if self._process.stdout is None or self._process.stdout.readline() != b"ready\n":
            self.close()
            words = log.read_text().strip().splitlines()[-1:]
            raise SandboxError(f"The release server did not start: {' '.join(words)}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server; does nothing when it has ended."""
        if self._process is None:
            return
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
        if wait_until(lambda: process.poll() is not None, seconds=2) is None:
            process.kill()
        process.wait()

"""The base image: Debian 13 as its official AMI is, built once and shared by every machine.

An image is a stack of directories that a machine's disk is laid over. It is built under a
temporary name by processes that die with this one, and gets its name, which holds a digest of
the recipe, only when it is complete. A changed recipe is therefore another image.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from sandbox.host import Progress, SandboxError, kill_with_parent, run
from sandbox.plan import CACHE_DIR

SUITE = "trixie"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
IMAGES_DIR = CACHE_DIR / "images"

# What the official AMI has and a program or person on a host may rely on. No kernel and no boot
# loader: the machines run on this machine's kernel.
PACKAGES = (
    *("systemd-sysv", "libpam-systemd", "udev", "dbus", "kmod", "procps", "tzdata"),
    *("openssh-server", "sudo", "python3", "ca-certificates", "curl", "cloud-init"),
    *("iproute2", "iputils-ping", "netbase", "e2fsprogs", "fdisk", "less", "nano", "vim-tiny"),
)

# Only downloaded, so that cloud-init's `packages:` still installs them, quickly.
PRIMED_PACKAGES = ("nginx", "ufw", "unattended-upgrades")

# What a given host may have already: the exporter as the distribution installs it (plain http on
# port 9100), and a firewall.
EXPORTER_PACKAGES = ("prometheus-node-exporter",)
UFW_PACKAGES = ("ufw",)

FILES = {
    "/etc/cloud/cloud.cfg.d/01_debian_cloud.cfg": """\
# As on the official AMI, but for where the data comes from.
datasource_list: [NoCloud]
network: {config: disabled}
manage_etc_hosts: true
ssh_pwauth: false
disable_root: true
apt: {preserve_sources_list: true}
system_info:
  default_user:
    name: admin
    gecos: Debian
    lock_passwd: true
    sudo: ["ALL=(ALL) NOPASSWD:ALL"]
    shell: /bin/bash
""",
    "/etc/ssh/sshd_config.d/10-keys-only.conf": "PasswordAuthentication no\n",
    # A stored copy of the mirror may be past the date that it promises to be fresh until.
    "/etc/apt/apt.conf.d/90sandbox": 'Acquire::Check-Valid-Until "false";\n',
    "/etc/machine-id": "",
    "/etc/hostname": "localhost\n",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One line of an apt source: where packages of which suite are, and any options of it."""

    uri: str
    suite: str
    components: tuple[str, ...] = ("main",)

    @property
    def line(self) -> str:
        """The one-line form."""
        return f"deb {self.uri} {self.suite} {' '.join(self.components)}"


@dataclass(frozen=True, kw_only=True)
class Image:
    """A complete image: directories to lay a disk over, the topmost first."""

    name: str
    layers: tuple[Path, ...]


def parse_sources(text: str, *, deb822: bool) -> list[Source]:
    """Read the binary package sources out of a file of /etc/apt, in either of its forms."""
    return _parse_deb822(text) if deb822 else _parse_one_line(text)


def _parse_deb822(text: str) -> list[Source]:
    sources: list[Source] = []
    # Comments may stand inside a paragraph and do not end it.
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        key = ""
        for line in paragraph.splitlines():
            if line[:1] in (" ", "\t"):
                fields[key] = f"{fields.get(key, '')} {line.strip()}"
            elif ":" in line:
                name, _, value = line.partition(":")
                key = name.strip().lower()
                fields[key] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes") == "no":
            continue
        components = tuple(fields.get("components", "").split())
        sources += [
            Source(uri=uri, suite=suite, components=components)
            for uri in fields.get("uris", "").split()
            for suite in fields.get("suites", "").split()
        ]
    return sources


def _parse_one_line(text: str) -> list[Source]:
    sources: list[Source] = []
    for line in text.splitlines():
        words = re.sub(r"\[[^]]*\]", " ", line.partition("#")[0]).split()
        if len(words) >= 3 and words[0] == "deb":
            sources.append(Source(uri=words[1], suite=words[2], components=tuple(words[3:])))
    return sources


def machine_sources(etc_apt: Path = Path("/etc/apt")) -> list[Source]:
    """Return every package source that this machine uses."""
    files = [etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*"))]
    return [
        replace(source, uri=uri)
        for file in files
        if file.is_file() and file.suffix in (".list", ".sources")
        for source in parse_sources(file.read_text(), deb822=file.suffix == ".sources")
        if (uri := _address(source.uri))
    ]


def _address(uri: str) -> str:
    """The address itself: of a list of mirrors, as Debian's cloud images have, the first."""
    listed = urlsplit(uri)
    if listed.scheme != "mirror+file":
        return uri
    try:
        # After an address may follow what apt shall know of it.
        found = re.search(r"^\s*(https?://\S+)", Path(listed.path).read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""


def mirror(sources: Sequence[Source] | None = None) -> str:
    """Return the address of this machine's own Debian mirror.

    Raises SandboxError where it has none, as on a derivative: SANDBOX_DEBIAN_MIRROR names one.
    """
    if given := os.environ.get("SANDBOX_DEBIAN_MIRROR"):
        return given
    for source in machine_sources() if sources is None else sources:
        path = urlsplit(source.uri).path.rstrip("/")
        if path.endswith("/debian") and "main" in source.components:
            return source.uri
    raise SandboxError(
        "No Debian mirror stands in this machine's package sources (/etc/apt/sources.list and "
        "sources.list.d), so there is nothing to build a Debian 13 machine from.",
        "Name one: SANDBOX_DEBIAN_MIRROR=<address of a Debian mirror> make up",
    )


def image_sources(sources: Sequence[Source] | None = None) -> list[Source]:
    """Return the sources of the image: the machine's mirror, with its security suite if used.

    Debian's alone: on a derivative a suite of this name is of another distribution.
    """
    sources = machine_sources() if sources is None else sources
    found = [Source(uri=mirror(sources), suite=SUITE)]
    security = [s.uri for s in sources if s.suite.endswith("-security") and _is_debians(s.uri)]
    found += [Source(uri=uri, suite=f"{SUITE}-security") for uri in dict.fromkeys(security)][:1]
    return found


def _is_debians(security: str) -> bool:
    parts = urlsplit(security)
    return parts.scheme in ("http", "https") and parts.path.rstrip("/").endswith("/debian-security")


def proxy_options() -> list[str]:
    """Return apt's proxy settings on this machine, since a private apt does not read them."""
    dump = run(["apt-config", "dump"], check=False).stdout
    kept = re.compile(r'^Acquire::(http|https)::Proxy(::\S+)? ".+";$')
    return [line for line in dump.splitlines() if kept.match(line)]


def ensure_image(
    progress: Progress,
    *,
    primed_packages: Sequence[str] = PRIMED_PACKAGES,
    installed_packages: Sequence[str] = (),
) -> Image:
    """Return the base image, building it where it is missing.

    primed_packages: downloaded into apt's cache in the image, not installed.
    installed_packages: installed in a layer over the base image (what a given host has already).
    Raises SandboxError with apt's own words when a package cannot be had.
    """
    sources = image_sources()
    recipe = [SUITE, PACKAGES, [s.line for s in sources], FILES, proxy_options(), "1"]
    base_name = f"base-{_digest([*recipe, sorted(primed_packages)])}"
    base = IMAGES_DIR / base_name
    layer_name = f"layer-{_digest([base_name, sorted(installed_packages)])}"
    layer = IMAGES_DIR / layer_name
    if not base.is_dir() or (installed_packages and not layer.is_dir()):
        with _building(progress):
            if not base.is_dir():
                with progress(f"Building the Debian 13 ({SUITE}) base image"):
                    _build_base(base, sources, primed_packages)
                _remove_old(keep=base_name)
            if installed_packages and not layer.is_dir():
                with progress(f"Adding {', '.join(installed_packages)} to the image"):
                    _build_layer(layer, base, installed_packages)
    if not installed_packages:
        return Image(name=base_name, layers=(base,))
    return Image(name=layer_name, layers=(layer, base))


def _digest(recipe: object) -> str:
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


@contextmanager
def _building(progress: Progress) -> Iterator[None]:
    """Let one build run at a time, and clear away what a killed one left."""
    IMAGES_DIR.mkdir(parents=True, exist_ok=True)
    with (IMAGES_DIR / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with progress("Waiting for another build of the image"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        # Its processes died with it, and its mounts with them: only plain folders are left.
        for leftover in IMAGES_DIR.glob("tmp-*"):
            shutil.rmtree(leftover)
        yield


def _build_base(base: Path, sources: Sequence[Source], primed: Sequence[str]) -> None:
    building = IMAGES_DIR / f"tmp-{base.name}"
    work = IMAGES_DIR / f"tmp-{base.name}.work"
    work.mkdir()
    hooks = ['rm -f "$1"/etc/ssh/ssh_host_*']
    for path, content in FILES.items():
        staged = work / path.strip("/").replace("/", "_")
        staged.write_text(content)
        hooks.append(f'mkdir -p "$1{Path(path).parent}" && cp {staged} "$1{path}"')
    if primed:
        hooks.append(f'chroot "$1" apt-get --yes --download-only install {" ".join(primed)}')
    command = [
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=apt", "--format=directory"),
        f"--keyring={KEYRING}",
        f"--include={','.join(PACKAGES)}",
        # What stays in apt's cache is what we put there, and the lists that it came from.
        "--skip=cleanup/apt/lists,cleanup/apt/cache,cleanup/reproducible/machine-id",
        "--aptopt=Acquire::Check-Valid-Until false",
        *(f"--aptopt={option}" for option in proxy_options()),
        # Nothing in a half-built image needs to survive a power cut.
        "--dpkgopt=force-unsafe-io",
        '--customize-hook=chroot "$1" apt-get clean',
        *(f"--customize-hook={hook}" for hook in hooks),
        SUITE,
        str(building),
        *(source.line for source in sources),
    ]
    env = {**os.environ, "TMPDIR": str(work), "LC_ALL": "C.UTF-8"}
    run(kill_with_parent(command), env=env, timeout=1800)
    (building / "etc/dpkg/dpkg.cfg.d/99mmdebstrap").unlink(missing_ok=True)
    shutil.rmtree(work)
    building.rename(base)


# $1 base, $2 upper, $3 overlay's work folder, $4 where to mount; then packages.
_LAYER = """
set -eu
base=$1 upper=$2 work=$3 root=$4
shift 4
mount -t overlay overlay -o "lowerdir=$base,upperdir=$upper,workdir=$work" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount --bind "$(realpath /etc/resolv.conf)" "$root/etc/resolv.conf"
export DEBIAN_FRONTEND=noninteractive
chroot "$root" apt-get --yes --no-install-recommends \\
    -o Dpkg::Options::=--force-unsafe-io install "$@"
chroot "$root" apt-get clean
umount "$root/etc/resolv.conf"
"""


def _build_layer(layer: Path, base: Path, packages: Sequence[str]) -> None:
    building = IMAGES_DIR / f"tmp-{layer.name}"
    upper, work, root = (building / name for name in ("upper", "work", "root"))
    for folder in (upper, work, root):
        folder.mkdir(parents=True)
    run(
        kill_with_parent(["sh", "-c", _LAYER, "sh", base, upper, work, root, *packages]),
        timeout=900,
    )
    upper.rename(layer)
    shutil.rmtree(building)


def _remove_old(*, keep: str) -> None:
    """Remove images of other recipes, but for those that a running machine has mounted."""
    mounted: set[str] = set()
    for mountinfo in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            mounted.update(re.findall(rf"{IMAGES_DIR}/([^:,/\s]+)", mountinfo.read_text()))
        except (OSError, UnicodeDecodeError):
            continue  # It ended, or is ending.
    for image in IMAGES_DIR.glob("*-*"):
        if image.is_dir() and image.name != keep and image.name not in mounted:
            # Renamed first, so that what is left by a kill now counts as a leftover.
            doomed = image.rename(IMAGES_DIR / f"tmp-old-{image.name}")
            shutil.rmtree(doomed)

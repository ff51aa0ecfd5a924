from pathlib import Path

import pytest

from sandbox.host import SandboxError, parse_cgroups
from sandbox.image import Source, image_sources, machine_sources, mirror, parse_sources
from sandbox.releases import pack

DEB822 = """\
Types: deb deb-src
# A comment inside a paragraph does not end it.
URIs: http://mirror.example.org/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .

Types: deb
URIs: http://mirror.example.org/debian-security
Suites: bookworm-security
Components: main
Enabled: yes

Enabled: no
Types: deb
URIs: http://off.example.org/debian
Suites: bookworm
Components: main
"""

ONE_LINE = """\
# deb http://commented.example.org/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/k.gpg] http://a.example.org/debian bookworm main
deb-src http://a.example.org/debian bookworm main
deb http://b.example.org/debian bookworm-security main contrib # trailing
"""


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SANDBOX_DEBIAN_MIRROR", raising=False)


def test_deb822_sources_are_read():
    assert parse_sources(DEB822, deb822=True) == [
        Source(uri="http://mirror.example.org/debian", suite=suite, components=("main", "contrib"))
        for suite in ("bookworm", "bookworm-updates")
    ] + [Source(uri="http://mirror.example.org/debian-security", suite="bookworm-security")]


def test_one_line_sources_are_read():
    assert [s.line for s in parse_sources(ONE_LINE, deb822=False)] == [
        "deb http://a.example.org/debian bookworm main",
        "deb http://b.example.org/debian bookworm-security main contrib",
    ]


def test_both_forms_are_found_below_etc_apt_and_nothing_else(tmp_path: Path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(ONE_LINE)
    (tmp_path / "sources.list.d/debian.sources").write_text(DEB822)
    (tmp_path / "sources.list.d/old.list.save").write_text(ONE_LINE)
    assert len(machine_sources(tmp_path)) == 5


def test_the_image_takes_the_machines_mirror_and_its_security_suite():
    sources = parse_sources(DEB822, deb822=True)
    assert mirror(sources) == "http://mirror.example.org/debian"
    assert [s.line for s in image_sources(sources)] == [
        "deb http://mirror.example.org/debian trixie main",
        "deb http://mirror.example.org/debian-security trixie-security main",
    ]


def test_a_machine_without_a_debian_mirror_is_told_what_to_do():
    other = [Source(uri="http://example.org/ubuntu", suite="noble")]
    with pytest.raises(SandboxError) as caught:
        mirror(other)
    assert "SANDBOX_DEBIAN_MIRROR" in caught.value.remedy


def test_a_security_suite_of_another_distribution_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SANDBOX_DEBIAN_MIRROR", "http://given.example.org/debian")
    other = [
        Source(uri="http://security.example.org/ubuntu", suite="noble-security"),
        Source(uri="file:/srv/debian-security", suite="bookworm-security"),
    ]
    assert [s.line for s in image_sources(other)] == [
        "deb http://given.example.org/debian trixie main"
    ]
    debians = Source(uri="https://a.example.org/debian-security/", suite="bookworm-security")
    assert [s.line for s in image_sources([*other, debians])][1:] == [
        "deb https://a.example.org/debian-security/ trixie-security main"
    ]


def test_a_file_of_mirrors_stands_for_its_first(tmp_path: Path):
    mirrors = tmp_path / "mirrors"
    mirrors.mkdir()
    (mirrors / "debian.list").write_text(
        "# Mirrors\nftp://c.example.org/debian\n"
        "https://a.example.org/debian\tpriority:1\nhttps://b.example.org/debian\n"
    )
    (mirrors / "security.list").write_text("https://a.example.org/debian-security\n")
    (tmp_path / "sources.list").write_text(
        f"deb mirror+file://{mirrors}/debian.list bookworm main\n"
        f"deb mirror+file:{mirrors}/security.list bookworm-security main\n"
        f"deb mirror+file://{mirrors}/not-there/debian bookworm main\n"
    )
    assert [s.line for s in image_sources(machine_sources(tmp_path))] == [
        "deb https://a.example.org/debian trixie main",
        "deb https://a.example.org/debian-security trixie-security main",
    ]
    assert len(machine_sources(tmp_path)) == 2


def test_a_tarball_is_the_same_bytes_on_every_run(tmp_path: Path):
    for name in ("b", "a"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    files = {name: tmp_path / name for name in ("b", "a")}
    first = pack("prog-1.0.linux-amd64", files)
    (tmp_path / "a").touch()
    assert pack("prog-1.0.linux-amd64", dict(reversed(list(files.items())))) == first


V1 = """\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:5 - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def test_version_1_control_groups_are_found_with_every_tree():
    found = parse_cgroups(V1)
    assert found.version == 1
    assert found.limits["cpu"] == Path("/sys/fs/cgroup/cpu,cpuacct")
    assert Path("/sys/fs/cgroup/unified") in found.trees
    assert Path("/sys/fs/cgroup/systemd") in found.trees


def test_version_2_control_groups_are_one_tree():
    found = parse_cgroups(V2)
    assert (found.version, found.trees) == (2, (Path("/sys/fs/cgroup"),))


def test_no_control_groups_are_an_error():
    with pytest.raises(SandboxError, match="control groups"):
        parse_cgroups("24 1 0:22 / /sys rw - sysfs sysfs rw\n")

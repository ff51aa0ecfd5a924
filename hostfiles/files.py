"""What a host is made of: files, the checks they must pass, and the units that read them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hostfiles.model import Release


@dataclass(frozen=True, kw_only=True)
class File:
    """One file on a host. Secrecy is a property of the file: user-data never holds a secret one."""

    path: str
    content: str = field(repr=False)
    owner: str = "root"
    group: str = "root"
    mode: int = 0o644
    secret: bool = False


def secret_file(path: str, content: str, group: str) -> File:
    """A file that root may write, the programs of a group may read, and nobody else."""
    return File(path=path, content=content, group=group, mode=0o640, secret=True)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A validator that apply-bundle runs on the staged tree before anything is swapped.

    `{tree}` in an argument stands for the staged tree's root; a non-zero exit refuses the bundle.
    """

    name: str
    argv: tuple[str, ...]


def unit_check(name: str, *units: str) -> Check:
    """systemd reads the unit files of these paths, and finds the programs that they start."""
    argv = ("/usr/bin/systemd-analyze", "verify", "--man=no", "--recursive-errors=no")
    return Check(name=name, argv=(*argv, *(f"{{tree}}{unit}" for unit in units)))


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A systemd unit (or one-shot action) that reads files of the bundle.

    A change of a file whose path starts with one of `restart_on` restarts the unit, one of
    `reload_on` reloads it. `ready` is run until it exits 0; a unit that does not get ready in
    `ready_seconds` rolls the bundle back.
    """

    name: str
    restart_on: tuple[str, ...] = ()
    reload_on: tuple[str, ...] = ()
    ready: tuple[str, ...] = ()
    ready_seconds: int = 60


@dataclass(frozen=True, kw_only=True)
class HostFiles:
    """Everything that makes a machine one of ours.

    `first_boot` are files as they are until the first bundle, in the place of those of `files`.
    """

    files: tuple[File, ...]
    checks: tuple[Check, ...]
    units: tuple[Unit, ...]
    releases: tuple[Release, ...]
    packages: tuple[str, ...]
    first_boot: tuple[File, ...] = ()

    def with_files(self, more: tuple[File, ...]) -> HostFiles:
        """The same host with more files, as when the secret ones join the others."""
        return replace(self, files=(*self.files, *more))

"""Pinned releases: where they lie on a host, and what fetches them."""

from __future__ import annotations

from hostfiles.model import Release


def directory(release: Release) -> str:
    """Where install-release puts it. The version is in the path, so units change with it."""
    return f"/opt/releases/{release.name}-{release.version}"


def install_command(release: Release) -> tuple[str, ...]:
    """The command that fetches it, unless it is there already."""
    return (
        "/usr/local/sbin/install-release",
        release.name,
        release.version,
        release.url,
        release.sha256,
    )

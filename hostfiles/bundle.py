"""The bundle: everything a host is, as the JSON that cloud-init/apply-bundle reads on stdin."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from hostfiles.files import File, HostFiles

# apply-bundle refuses another number.
FORMAT = 1


def render(host: HostFiles, secret: tuple[File, ...] = ()) -> str:
    """The bundle of a host with its secret files. The same values give the same text."""
    return json.dumps(as_data(host, secret), sort_keys=True, indent=1)


def as_data(host: HostFiles, secret: tuple[File, ...] = ()) -> dict[str, Any]:
    """The same before it is JSON."""
    whole = host.with_files(secret)
    paths = [file.path for file in whole.files]
    if len(paths) != len(set(paths)):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"rendered twice: {', '.join(twice)}")
    return {
        "format": FORMAT,
        "files": sorted(map(dataclasses.asdict, whole.files), key=lambda file: file["path"]),
        "checks": [dataclasses.asdict(check) for check in whole.checks],
        "units": [dataclasses.asdict(unit) for unit in whole.units],
        "releases": [dataclasses.asdict(release) for release in whole.releases],
    }

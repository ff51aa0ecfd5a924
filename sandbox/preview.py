"""What a change of the program or its settings would do, told without any account.

Evaluates the program of another commit and the one in the working tree with the Recorder, and
prints resource by resource, property by property, what would be created, changed, replaced and
deleted. Secrets are masked; of a host's bundle the files are compared one by one.
"""

from __future__ import annotations

import argparse
import difflib
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pulumi

from sandbox.host import SandboxError
from sandbox.plan import Plan
from sandbox.program import Resource, Secret, evaluate, plain, read_project
from sandbox.providers import replaces
from sandbox.recorder import Recorder
from sandbox.world import load_world, resolve_given

HERE = Path(__file__).resolve().parent.parent
_MASK = "[secret]"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make preview", description=__doc__)
    parser.add_argument("--ref", default="main", help="the commit to compare with")
    parser.add_argument("--stack", default="dev", help="the stack whose settings are used")
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.dump:
        sys.stdout.buffer.write(pickle.dumps(_registered(chosen.dump, chosen.stack)))
        return 0
    try:
        with tempfile.TemporaryDirectory(prefix="pf-preview-") as folder:
            _check_out(chosen.ref, Path(folder))
            before = _evaluate_apart(Path(folder), chosen.stack, chosen.ref)
        after = _evaluate_apart(HERE, chosen.stack, "the working tree")
    except PreviewError as error:
        print(error, file=sys.stderr)
        return 1
    lines = list(differences(before, after))
    print(f"stack {chosen.stack}, {chosen.ref} -> working tree")
    print("\n".join(lines) if lines else "no changes")
    return 0


class PreviewError(Exception):
    """A commit could not be read or its program not be evaluated."""


def differences(before: list[Resource], after: list[Resource]) -> Iterator[str]:
    """What would happen to resources, a few lines for each that something happens to."""
    old = {resource.urn: resource for resource in before if resource.custom}
    new = {resource.urn: resource for resource in after if resource.custom}
    for urn in sorted(old.keys() | new.keys(), key=lambda urn: urn.split("::")[-2:]):
        if urn not in old:
            yield f"+ create  {_title(new[urn])}"
            yield from (
                f"    + {key}: {_shown(value)}" for key, value in sorted(new[urn].inputs.items())
            )
        elif urn not in new:
            yield f"- delete  {_title(old[urn])}"
        else:
            yield from _changes(old[urn], new[urn])


def _changes(old: Resource, new: Resource) -> Iterator[str]:
    changed = {
        key
        for key in old.inputs.keys() | new.inputs.keys()
        if plain(old.inputs.get(key)) != plain(new.inputs.get(key))
        and key not in new.ignore_changes
    }
    if not changed:
        return
    replacing = replaces(new.type, changed)
    yield f"{'± replace' if replacing else '~ change '} {_title(new)}"
    for key in sorted(changed):
        because = " (replaces)" if key in replacing else ""
        yield from _property(key, old.inputs.get(key), new.inputs.get(key), because)


def _property(key: str, old: Any, new: Any, because: str) -> Iterator[str]:
    files = _files(old), _files(new)
    if files[0] and files[1]:
        yield f"    ~ {key}: {_MASK}, of which:"
        for path in sorted(files[0].keys() | files[1].keys()):
            yield from _file(path, files[0].get(path), files[1].get(path))
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        for inner in sorted(old.keys() | new.keys()):
            if plain(old.get(inner)) != plain(new.get(inner)):
                yield from _property(f"{key}.{inner}", old.get(inner), new.get(inner), because)
    else:
        yield f"    ~ {key}: {_shown(old)} -> {_shown(new)}{because}"


def _files(value: Any) -> dict[str, dict[str, Any]]:
    """The files of a host's bundle, by path; nothing for any other value."""
    text = plain(value)
    if not isinstance(text, str) or not text.startswith("{"):
        return {}
    try:
        return {file["path"]: file for file in json.loads(text)["files"]}
    except (ValueError, KeyError, TypeError):
        return {}


def _file(path: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Iterator[str]:
    if old == new:
        return
    verb = "+" if old is None else "-" if new is None else "~"
    masked = (old or {}).get("secret", False) or (new or {}).get("secret", False)
    yield f"        {verb} {path}{' ' + _MASK if masked else ''}"
    if masked or old is None or new is None:
        return
    lines = difflib.unified_diff(
        old["content"].splitlines(), new["content"].splitlines(), lineterm="", n=0
    )
    for line in list(lines)[2:]:
        if not line.startswith("@@"):
            yield f"            {line[0]} {line[1:]}"


def _title(resource: Resource) -> str:
    return f"{resource.type} {resource.name}"


def _shown(value: Any) -> str:
    masked = _masked(value)
    text = json.dumps(masked, sort_keys=True) if not isinstance(masked, str) else masked
    return text if len(text) <= 120 else f"{text[:117]}..."


def _masked(value: Any) -> Any:
    if isinstance(value, Secret):
        return _MASK
    if isinstance(value, Mapping):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return value


def _check_out(ref: str, folder: Path) -> None:
    done = subprocess.run(
        ["git", "-C", str(HERE), "archive", "--format=tar", ref], capture_output=True, check=False
    )
    if done.returncode:
        raise PreviewError(
            f"REF={ref}: {done.stderr.decode().strip()}; name a commit, branch or tag of this "
            "repository (in CI, fetch it first)"
        )
    # Not tarfile: Debian 12's Python 3.11 has no filters.
    subprocess.run(["tar", "-x", "-C", str(folder)], input=done.stdout, check=True)


def _evaluate_apart(directory: Path, stack: str, what: str) -> list[Resource]:
    """In a process of its own: two commits' modules have the same names."""
    done = subprocess.run(
        [sys.executable, "-m", "sandbox.preview", "--dump", str(directory), "--stack", stack],
        cwd=HERE,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise PreviewError(f"{what}: {done.stderr.decode().strip()}")
    return pickle.loads(done.stdout)  # noqa: S301 - written by our own child just now


def _registered(directory: Path, stack: str) -> list[Resource]:
    try:
        project = read_project(directory, stack)
        recorder = Recorder(partial(_other_stack, project.config.get(f"{project.name}:master")))
        config = resolve_given(
            project.config, Plan(slot=0, state_dir=HERE), load_world(), stand_ins=True
        )
        evaluate(replace(project, config=config), recorder)
    except (pulumi.RunError, SandboxError) as error:
        sys.exit(f"stack {stack}: {error}")
    return recorder.resources


def _other_stack(master: Any, name: str) -> dict[str, Any]:
    """Stand-ins for what another stack exports, which no preview without an account can know."""
    sites = [
        site for other in master["otherStacks"] if other["stack"] == name for site in other["sites"]
    ]
    public = {"publicIp": "198.18.0.1", "port": 9095, "user": "user", "match": ["up"]}
    public |= {"scrapeInterval": "15s", "sampleLimit": 1}
    secret: dict[str, Any] = {"caNotAfter": 0, "notAfter": 0}
    secret |= dict.fromkeys(("password", "caCertificate", "certificate", "key"), "stand-in")
    return {
        "federation": {site: {**public, "host": f"{site}.example"} for site in sites},
        "federationSecrets": Secret(dict.fromkeys(sites, secret)),
    }


if __name__ == "__main__":
    sys.exit(main())

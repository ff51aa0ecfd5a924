"""The program, evaluated with nothing behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from components import credentials
from sandbox import hashes
from sandbox.program import Project, evaluate, read_project
from sandbox.recorder import Recorder

ROOT = Path(__file__).parents[2]
NAMESPACE = "prometheus-federation"


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What a run of the program registered and exported."""

    recorder: Recorder
    outputs: Mapping[str, Any]
    project: Project


Evaluate = Callable[..., Evaluated]


def run_program(stack: str = "dev", **overrides: Any) -> Evaluated:
    """Evaluates the program for a stack, with other values for some settings of ours."""
    project = read_project(
        ROOT, stack, overrides={f"{NAMESPACE}:{key}": value for key, value in overrides.items()}
    )
    recorder = Recorder()
    outputs = evaluate(project, recorder)
    return Evaluated(recorder=recorder, outputs=outputs, project=project)


@pytest.fixture(scope="session")
def dev() -> Evaluated:
    """The environment of Pulumi.dev.yaml. Not to be changed: all tests share it."""
    return run_program()


@pytest.fixture(autouse=True, scope="session")
def hashed_once() -> Iterator[None]:
    """The recorder gives the same passwords every time: each costs its hash once a session."""
    with hashes.remembered({}):
        yield


@pytest.fixture
def slaves(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[dict[str, Any]]]:
    """Settings of so many sites, alike but for their names. Tests of many sites are about sites:
    their targets are plain, and their passwords' hashes cheap."""
    monkeypatch.setattr(credentials, "STRONG_COST", credentials.CHEAP_COST)
    config = yaml.safe_load((ROOT / "Pulumi.dev.yaml").read_text())["config"]
    one = config[f"{NAMESPACE}:slaves"][0]
    one["jobs"][0]["targets"] = [f"{host['host']}:9100" for host in one["jobs"][0].pop("hosts")]
    del one["hostAccess"]

    def make(count: int) -> list[dict[str, Any]]:
        return [
            {**copy.deepcopy(one), "site": f"site{n}", "host": f"slave{n}"} for n in range(count)
        ]

    return make

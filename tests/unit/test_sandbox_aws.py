"""The aws provider, as far as it needs no kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox import providers
from sandbox.aws import AwsProvider
from sandbox.image import Image
from sandbox.network import Fabric, NetworkModel
from sandbox.plan import Plan
from sandbox.program import Resource
from sandbox.world import load_world, with_world


@contextlib.contextmanager
def silent(text: str) -> Iterator[None]:
    yield


@pytest.fixture
def aws(tmp_path: Path) -> AwsProvider:
    # A slot whose runtime folder is never there.
    plan = Plan(3, tmp_path)
    return AwsProvider(plan, load_world(), Fabric(plan), Image(name="i", layers=()), silent)


def create(aws: AwsProvider, type_: str, **inputs: Any) -> tuple[str, dict[str, Any]]:
    resource = Resource(urn="u", type=type_, name="watcher", inputs=inputs, custom=True, parent="")
    return aws.create(resource, inputs)


def test_roles_are_noted_and_do_nothing(aws: AwsProvider) -> None:
    name, role = create(aws, providers.ROLE, namePrefix="watch-")
    assert name.startswith("watch-")
    assert role["arn"] == f"arn:aws:iam::000000000000:role/{name}"
    policy, _ = create(aws, providers.ROLE_POLICY, role=name, name="read")
    assert policy == f"{name}:read"
    profile, outputs = create(aws, providers.INSTANCE_PROFILE, role=name)
    assert profile.startswith("watcher-")
    assert (outputs["name"], outputs["role"]) == (profile, name)


def test_given_hosts_keep_their_public_addresses_beside_the_programs_own(
    aws: AwsProvider, tmp_path: Path
) -> None:
    world = load_world()
    public = replace(world, hosts=(replace(world.hosts[0], public=True), *world.hosts[1:]))
    given = with_world(NetworkModel(), public, Plan(3, tmp_path))
    assert aws._model(given).eips == given.eips
    assert list(given.eips.values()) == ["core01"]
    stale = replace(given, eips={**given.eips, "198.51.100.65": "an-instance-that-is-gone"})
    assert aws._model(stale).eips == given.eips

"""The engine converges: what is there stays, what differs changes, what is gone goes."""

from __future__ import annotations

import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from sandbox import providers
from sandbox.engine import Engine, ProtectedError
from sandbox.program import Project, Resource, ResourcesFailedError, Secret, read_project
from sandbox.progress import silent
from sandbox.providers import Inputs, Outputs, Provider
from sandbox.state import State


class Recording(Provider):
    """A provider that writes down what it is asked to do."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fails: set[str] = set()
        self.old: set[str] = set()
        self.made = 0

    def create(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        self.calls.append(("create", resource.name))
        if resource.name in self.fails:
            raise RuntimeError(f"{resource.name} cannot be made")
        self.made += 1
        return f"id-{self.made}", {**inputs, "allocationId": f"allocation-{self.made}"}

    def update(
        self, resource: Resource, id_: str, inputs: Inputs, old: Inputs, outputs: Outputs
    ) -> Outputs:
        self.calls.append(("update", resource.name))
        return {**outputs, **inputs}

    def delete(self, type_: str, id_: str, inputs: Inputs, timeout: str) -> None:
        self.calls.append(("delete", f"{id_} {timeout}".strip()))
        if id_ in self.fails:
            raise RuntimeError(f"{id_} cannot be deleted")

    def outdated(self, type_: str, id_: str, outputs: Outputs) -> str:
        return "too old" if id_ in self.old else ""


class World:
    """A program, its state, and an engine over the recording provider."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.provider = Recording()
        (folder / "Pulumi.yaml").write_text("name: tried\nruntime: python\n")
        (folder / "Pulumi.test.yaml").write_text("config: {}\n")

    def project(self, program: str) -> Project:
        imports = "import pulumi, pulumi_aws as aws\nfrom pulumi import ResourceOptions as Opts\n"
        (self.folder / "__main__.py").write_text(imports + textwrap.dedent(program))
        return read_project(self.folder, "test")

    def up(self, program: str) -> str:
        project = self.project(program)
        return str(self.engine().up(project))

    def engine(self) -> Engine:
        state = State.load(self.folder / "state.json")
        return Engine(
            state,
            {"aws": self.provider},
            lambda token, args: {},
            silent,
            lambda name: {},
            threading.Event(),
        )

    def told(self) -> list[tuple[str, str]]:
        calls, self.provider.calls = self.provider.calls, []
        return calls


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


PAIR = """
eip = aws.ec2.Eip("address", domain="vpc", tags={{"a": "{tag}"}})
aws.ec2.EipAssociation("link", allocation_id=eip.allocation_id, instance_id="{instance}")
"""


def test_the_first_run_creates_in_the_order_of_dependencies(world: World) -> None:
    assert world.up(PAIR.format(tag=1, instance="i-1")) == "2 created"
    assert world.told() == [("create", "address"), ("create", "link")]


def test_the_same_program_again_touches_nothing(world: World) -> None:
    world.up(PAIR.format(tag=1, instance="i-1"))
    world.told()
    assert world.up(PAIR.format(tag=1, instance="i-1")) == "no changes"
    assert world.told() == []


def test_a_changed_property_changes_its_resource_alone(world: World) -> None:
    world.up(PAIR.format(tag=1, instance="i-1"))
    world.told()
    assert world.up(PAIR.format(tag=2, instance="i-1")) == "1 changed"
    assert world.told() == [("update", "address")]


def test_a_replacement_makes_the_new_one_before_the_old_one_goes(world: World) -> None:
    world.up(PAIR.format(tag=1, instance="i-1"))
    world.told()
    assert world.up(PAIR.format(tag=1, instance="i-2")) == "1 replaced, 1 deleted"
    assert world.told() == [("create", "link"), ("delete", "id-2")]


def test_delete_before_replace_is_heeded(world: World) -> None:
    program = """
    aws.ec2.VolumeAttachment(
        "disk", device_name="/dev/sdf", volume_id="v", instance_id="{}",
        opts=Opts(delete_before_replace=True),
    )
    """
    world.up(program.format("i-1"))
    world.told()
    world.up(program.format("i-2"))
    assert world.told() == [("delete", "id-1"), ("create", "disk")]


def test_what_depends_on_a_replaced_resource_is_deleted_before_it(world: World) -> None:
    program = """
    link = aws.ec2.EipAssociation("link", allocation_id="a", instance_id="{instance}")
    middle = aws.ec2.Eip("middle", tags={{"a": "{instance}"}}, opts=Opts(depends_on=[link]))
    aws.ec2.Eip("last", opts=Opts(depends_on=[middle]))
    """
    world.up(program.format(instance="i-1"))
    assert world.up(program.format(instance="i-2")) == "1 changed, 1 replaced, 1 deleted"
    ids = {record.name: record.id for record in world.engine()._state.records.values()}
    world.told()
    world.up("")
    assert world.told() == [("delete", ids[name]) for name in ("last", "middle", "link")]


def test_what_the_program_no_longer_names_is_deleted_last_made_first(world: World) -> None:
    world.up(PAIR.format(tag=1, instance="i-1"))
    world.told()
    assert world.up("") == "2 deleted"
    assert world.told() == [("delete", "id-2"), ("delete", "id-1")]


def test_ignored_changes_are_ignored(world: World) -> None:
    program = """
    aws.ec2.Instance("host", ami="{}", instance_type="t3.micro",
                     opts=Opts(ignore_changes=["ami"]))
    """
    world.up(program.format("ami-1"))
    world.told()
    assert world.up(program.format("ami-2")) == "no changes"


def test_what_is_replaced_is_made_with_what_the_program_says_of_ignored_properties_too(
    world: World,
) -> None:
    program = """
    aws.ec2.Instance("host", ami="{}", subnet_id="{}", instance_type="t3.micro",
                     opts=Opts(ignore_changes=["ami"]))
    """
    world.up(program.format("ami-1", "subnet-1"))
    assert world.up(program.format("ami-2", "subnet-2")) == "1 replaced, 1 deleted"
    records = State.load(world.folder / "state.json").records.values()
    (record,) = [record for record in records if record.name == "host"]
    assert record.inputs["ami"] == "ami-2"


def test_what_is_outdated_is_replaced_without_any_change(world: World) -> None:
    world.up(PAIR.format(tag=1, instance="i-1"))
    world.told()
    world.provider.old = {"id-2"}
    world.up(PAIR.format(tag=1, instance="i-1"))
    assert world.told() == [("create", "link"), ("delete", "id-2")]


def test_a_failure_leaves_the_rest_done_deletes_nothing_and_is_finished_later(
    world: World,
) -> None:
    world.up(PAIR.format(tag=1, instance="i-1"))
    world.told()
    world.provider.fails = {"third"}
    more = 'aws.ec2.Eip("second", domain="vpc")\naws.ec2.Eip("third", domain="vpc")\n'
    with pytest.raises(RuntimeError, match="third cannot be made"):
        world.up(more)
    assert not [call for call in world.told() if call[0] == "delete"]
    world.provider.fails = set()
    assert world.up(more) == "1 created, 2 deleted"


CHAINS = """
def chain(name):
    first = aws.ec2.Eip(f"{name}-1", domain="vpc")
    second = aws.ec2.Eip(f"{name}-2", domain="vpc", opts=Opts(depends_on=[first]))
    aws.ec2.Eip(f"{name}-3", domain="vpc", opts=Opts(depends_on=[second]))
for name in "abcd":
    chain(name)
"""


def test_what_does_not_depend_on_a_failure_is_done_and_every_failure_is_told(
    world: World,
) -> None:
    world.provider.fails = {"a-1", "c-2"}
    with pytest.raises(ResourcesFailedError) as told:
        world.up(CHAINS)
    assert str(told.value).splitlines() == [
        "2 resources failed:",
        "a-1: a-1 cannot be made",
        "c-2: c-2 cannot be made",
    ]
    tried = {name for _, name in world.told()}
    assert tried == {"a-1", "c-1", "c-2", *(f"{chain}-{n}" for chain in "bd" for n in (1, 2, 3))}
    world.provider.fails = set()
    assert world.up(CHAINS) == "5 created"
    assert {name for _, name in world.told()} == {"a-1", "a-2", "a-3", "c-2", "c-3"}


def test_what_was_called_off_is_not_told_as_a_failure(world: World) -> None:
    engine = world.engine()

    create, begun = world.provider.create, threading.Event()

    def fail_and_stop(resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        if resource.name == "a":
            assert begun.wait(10)
            engine.cancelled.set()
            raise RuntimeError("a cannot be made")
        begun.set()
        assert engine.cancelled.wait(10)
        return create(resource, inputs)

    world.provider.create = fail_and_stop
    program = """
    aws.ec2.Eip("a", domain="vpc")
    first = aws.ec2.Eip("b-1", domain="vpc")
    aws.ec2.Eip("b-2", domain="vpc", opts=Opts(depends_on=[first]))
    """
    with pytest.raises(RuntimeError, match=r"^a cannot be made$"):
        engine.up(world.project(program))
    assert {r.name for r in world.engine()._state.records.values()} == {"b-1"}
    again = world.engine()
    again.cancelled.set()
    with pytest.raises(InterruptedError):
        again.up(world.project('aws.ec2.Eip("a", domain="vpc")'))


def test_a_deletion_that_fails_keeps_what_it_needs_and_stops_no_other(world: World) -> None:
    world.up(CHAINS)
    ids = {r.name: r.id for r in world.engine()._state.records.values()}
    world.told()
    world.provider.fails = {ids["a-2"], ids["c-3"]}
    with pytest.raises(ResourcesFailedError) as told:
        world.up("")
    assert {f"a-2: {ids['a-2']} cannot be deleted", f"c-3: {ids['c-3']} cannot be deleted"} < set(
        str(told.value).splitlines()
    )
    left = {r.name for r in world.engine()._state.records.values()}
    assert left == {"a-1", "a-2", "c-1", "c-2", "c-3"}
    world.provider.fails = set()
    assert world.up("") == "5 deleted"


def test_a_deletion_has_the_timeout_that_the_program_gave_last(world: World) -> None:
    program = """
    aws.ec2.Eip("a", domain="vpc", opts=Opts(
        custom_timeouts=pulumi.CustomTimeouts(delete="{}")))
    """
    world.up(program.format("5m"))
    assert world.up(program.format("7m")) == "no changes"
    world.told()
    world.up("")
    assert world.told() == [("delete", "id-1 7m")]


def test_nothing_is_deleted_where_one_of_it_is_protected(world: World) -> None:
    world.up(
        'aws.ebs.Volume("data", availability_zone="z", size=4, opts=Opts(protect=True))\n'
        'aws.ec2.Eip("a", domain="vpc")\n'
    )
    world.told()
    with pytest.raises(ProtectedError):
        world.up("")
    assert world.told() == []


def test_a_protected_resource_is_neither_replaced_nor_deleted(world: World) -> None:
    program = """
    aws.ebs.Volume("data", availability_zone="{}", size=4, opts=Opts(protect=True))
    """
    world.up(program.format("zone-a"))
    world.told()
    with pytest.raises(ProtectedError, match="protectData"):
        world.up(program.format("zone-b"))
    with pytest.raises(ProtectedError, match="protectData"):
        world.up("")
    assert world.told() == []


def test_secrets_are_ciphertext_in_the_state_and_come_back_whole(world: World) -> None:
    program = """
    aws.ec2.KeyPair("key", public_key=pulumi.Output.secret("canary-in-an-input"))
    pulumi.export("password", pulumi.Output.secret("canary-in-an-output"))
    pulumi.export("open", "for all to see")
    """
    world.up(program)
    text = (world.folder / "state.json").read_text()
    assert "canary" not in text
    assert "for all to see" in text
    state = State.load(world.folder / "state.json")
    assert state.outputs == {"password": Secret("canary-in-an-output"), "open": "for all to see"}
    (record,) = state.records.values()
    assert record.inputs["publicKey"] == Secret("canary-in-an-input")
    assert (world.folder / "passphrase").stat().st_mode & 0o777 == 0o600


def test_the_state_survives_a_run_that_was_killed_while_writing(world: World) -> None:
    world.up(PAIR.format(tag=1, instance="i-1"))
    (world.folder / "state.new").write_text('{"records": {"half')
    world.told()
    assert world.up(PAIR.format(tag=1, instance="i-1")) == "no changes"


def test_two_resources_of_one_name_are_refused(world: World) -> None:
    with pytest.raises(ValueError, match="name one otherwise"):
        world.up('aws.ec2.Eip("a", domain="vpc")\naws.ec2.Eip("a", domain="vpc")\n')


def test_a_resource_the_sandbox_does_not_know_fails_by_name() -> None:
    resource = Resource(urn="u", type="aws:x/y:Z", name="n", inputs={}, custom=True, parent="")
    with pytest.raises(NotImplementedError, match="aws:x/y:Z"):
        Provider().create(resource, {})


def test_every_type_with_secret_outputs_or_replacing_properties_is_known_once() -> None:
    tokens: dict[str, Any] = {k: v for k, v in vars(providers).items() if k.isupper()}
    types = [token for token in tokens.values() if isinstance(token, str)]
    assert len(types) == len(set(types))
    assert set(providers.REPLACE_ON) == set(types)
    assert set(providers.SECRET_OUTPUTS) <= set(types)

import stat
from pathlib import Path

import pytest

from sandbox.host import SandboxError
from sandbox.network import NetworkModel
from sandbox.plan import Plan
from sandbox.world import WORLD_FILE, load_world, with_world, world_key


@pytest.fixture
def edit(tmp_path: Path):
    """Write the shipped world with one text replaced."""

    def edited(old: str, new: str) -> Path:
        text = WORLD_FILE.read_text()
        assert old in text
        (tmp_path / "world.yaml").write_text(text.replace(old, new, 1))
        return tmp_path / "world.yaml"

    return edited


def test_the_shipped_world_has_the_four_hosts_of_the_document():
    world = load_world()
    assert [host.name for host in world.hosts] == [
        f"core0{n}.example.internal" for n in range(1, 5)
    ]
    assert {host.subnet for host in world.hosts} == {"subnet-dublin"}
    assert world.zone.name == "example.com"
    names = world.network_of("subnet-dublin").private_names
    assert names["core03.example.internal"] == "10.20.1.13"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("zone:", "zones:", "zone is None"),
        ("10.20.1.0/24", "10.20.1.7/24", "subnets.subnet-dublin is '10.20.1.7/24'"),
        ("10.20.1.0/24", "10.99.1.0/24", "is not in vpc-dublin's"),
        ("address: 10.20.1.11", "address: core", "hosts[0].address is 'core'"),
        ("address: 10.20.1.11", "address: 10.30.1.11", "core01's address 10.30.1.11"),
        ("10.20.1.12", "10.20.1.11", "core02 and core01 both have 10.20.1.11"),
        ("core02.example", "core01.example", "the host 'core01' is there twice"),
        ("subnet: subnet-dublin", "subnet: subnet-cork", "no subnet 'subnet-cork'"),
        ("memoryMib: 128", "memoryMib: 1", "hosts[0].memoryMib is 1"),
        ("memoryMib: 128", "memory: 128", "hosts[0].memory is not known"),
        ("zone: {", "zone: [", "is not YAML"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(edit, old: str, new: str, words: str):
    with pytest.raises(SandboxError) as caught:
        load_world(edit(old, new))
    assert words in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(SandboxError, match=r"no file .*none\.yaml"):
        load_world(tmp_path / "none.yaml")


def test_the_model_follows_the_world_and_keeps_the_programs_machines(edit):
    world = load_world()
    model = with_world(NetworkModel(), world)
    assert set(model.attachments) == {"core01", "core02", "core03", "core04"}
    fewer = load_world(
        edit(
            "  - {name: core04.example.internal, subnet: subnet-dublin, "
            "address: 10.20.1.14, memoryMib: 128}\n",
            "",
        )
    )
    before = [host.machine for host in world.hosts]
    assert set(with_world(model, fewer, before=before).attachments) == {
        "core01",
        "core02",
        "core03",
    }


def test_the_hosts_key_is_made_once_and_readable_by_its_owner_only(tmp_path: Path):
    plan = Plan(0, tmp_path)
    key = world_key(plan)
    content = key.read_bytes()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.with_suffix(".pub").read_text().startswith("ssh-ed25519 ")
    assert world_key(plan).read_bytes() == content

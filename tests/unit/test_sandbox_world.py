import stat
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from sandbox.host import SandboxError
from sandbox.network import NetworkModel
from sandbox.plan import Plan
from sandbox.world import (
    WORLD_FILE,
    Host,
    World,
    _seed,
    host_key,
    load_world,
    resolve_given,
    with_world,
    world_key,
)


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
        ("memoryMib: 128", "ufw: 1", "hosts[0].ufw is 1"),
        ("    natGateway: true", "    natGateway: yes!", "networks[0].natGateway is 'yes!'"),
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


def test_the_model_follows_the_world_and_keeps_the_programs_machines(edit, tmp_path: Path):
    world = load_world()
    plan = Plan(0, tmp_path)
    model = with_world(NetworkModel(), world, plan)
    assert set(model.attachments) == {"core01", "core02", "core03", "core04"}
    fewer = load_world(
        edit(
            "  - {name: core04.example.internal, subnet: subnet-dublin, "
            "address: 10.20.1.14, memoryMib: 128}\n",
            "",
        )
    )
    before = [host.machine for host in world.hosts]
    assert set(with_world(model, fewer, plan, before=before).attachments) == {
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


def with_host(world: World, number: int, **changes: bool) -> World:
    hosts = list(world.hosts)
    hosts[number] = replace(hosts[number], **changes)
    return replace(world, hosts=tuple(hosts))


def test_a_host_has_its_own_host_key_from_its_first_boot_on(tmp_path: Path):
    plan, world = Plan(0, tmp_path), load_world()
    first, second = world.hosts[:2]
    assert host_key(plan, first).read_bytes() != host_key(plan, second).read_bytes()
    data = yaml.safe_load(_seed(plan, world, first)["user-data"])
    key = serialization.load_ssh_private_key(data["ssh_keys"]["ed25519_private"].encode(), None)
    assert data["ssh_keys"]["ed25519_public"].split()[:2] == (
        key.public_key()
        .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        .decode()
        .split()
    )
    assert stat.S_IMODE(host_key(plan, first).stat().st_mode) == 0o600
    assert _seed(plan, world, first)["user-data"] == _seed(plan, world, first)["user-data"]


def test_a_hosts_firewall_lets_ssh_in_from_its_network_or_where_it_is_public_from_anywhere(
    tmp_path: Path,
):
    plan, world = Plan(0, tmp_path), load_world()
    assert "ufw" not in _seed(plan, world, world.hosts[0])["user-data"]

    def source(host: Host) -> str:
        allow, enable = yaml.safe_load(_seed(plan, world, host)["user-data"])["runcmd"]
        assert enable == ["ufw", "--force", "enable"]
        return allow[allow.index("from") + 1]

    assert source(replace(world.hosts[0], ufw=True)) == "10.20.0.0/16"
    assert source(replace(world.hosts[0], ufw=True, public=True)) == "any"


def test_packages_are_what_the_world_says():
    (host, *_) = load_world().hosts
    assert host.packages == ()
    assert replace(host, exporter=True).packages == ("prometheus-node-exporter",)
    assert replace(host, exporter=True, ufw=True).packages == ("prometheus-node-exporter", "ufw")


NAME = "core01.example.internal"


def test_placeholders_become_what_only_the_sandbox_knows(tmp_path: Path):
    plan, world = Plan(0, tmp_path), with_host(load_world(), 0, public=True)
    settings = {
        "p:slaves": [{"key": {"given": "sshKey"}, "hosts": [{"hostKey": {"given": NAME}}]}],
        "p:edge": {"given": f"{NAME}/publicAddress"},
        "p:other": {"given": "x", "and": ["more"]},
    }
    found = resolve_given(settings, plan, world)
    slave = found["p:slaves"][0]
    assert slave["key"] == world_key(plan).read_text()
    public = host_key(plan, world.hosts[0]).with_suffix(".pub").read_text()
    assert public.startswith(slave["hosts"][0]["hostKey"] + " ")
    assert len(slave["hosts"][0]["hostKey"].split()) == 2
    assert found["p:edge"] == "198.51.100.30"
    assert found["p:other"] == settings["p:other"]
    assert settings["p:edge"] == {"given": f"{NAME}/publicAddress"}


def test_stand_ins_look_alike_touch_nothing_and_are_always_the_same(tmp_path: Path):
    plan, world = Plan(0, tmp_path / "none"), load_world()
    settings = {"k": {"given": "sshKey"}, "h": {"given": NAME}}
    found = resolve_given(settings, plan, world, stand_ins=True)
    serialization.load_pem_private_key(found["k"].encode(), None)
    serialization.load_ssh_public_key(found["h"].encode())
    assert resolve_given(settings, plan, world, stand_ins=True) == found
    assert not plan.state_dir.exists()


def test_roots_are_given_where_there_is_a_public_authority(tmp_path: Path, edit):
    plan = Plan(0, tmp_path)
    world = load_world(edit("zone: {", "acme: true\nzone: {"))
    settings = {"r": {"given": "acmeRoots"}}
    x509.load_pem_x509_certificates(
        resolve_given(settings, plan, world, stand_ins=True)["r"].encode()
    )
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme/roots.pem").write_text("its roots")
    assert resolve_given(settings, plan, world)["r"] == "its roots"
    with pytest.raises(SandboxError, match="gives no 'acmeRoots'"):
        resolve_given(settings, plan, load_world())


@pytest.mark.parametrize("name", ["core09.example.internal", f"{NAME}/publicAddress", None, 7, []])
def test_an_unknown_placeholder_is_refused_with_its_place_and_those_there_are(
    tmp_path: Path, name: object
):
    settings = {"p:slaves": [{}, {"hostAccess": {"privateKey": {"given": name}}}]}
    with pytest.raises(SandboxError) as caught:
        resolve_given(settings, Plan(0, tmp_path), load_world())
    assert f"p:slaves[1].hostAccess.privateKey: the sandbox's world gives no {name!r}" in str(
        caught.value
    )
    assert f"sshKey, {NAME}, core02" in caught.value.remedy


def test_public_hosts_have_addresses_that_instances_do_not_get(tmp_path: Path):
    plan, world = Plan(0, tmp_path), with_host(load_world(), 1, public=True)
    before = NetworkModel(eips={"198.51.100.1": "slave", "198.51.100.30": "core02"})
    model = with_world(before, world, plan, before=["core02"])
    assert model.eips == {"198.51.100.1": "slave", "198.51.100.30": "core02"}
    assert model.public_addresses("vpc-dublin") == {"198.51.100.30": "10.20.1.12"}
    shut = with_world(model, load_world(), plan, before=["core02"])
    assert shut.eips == {"198.51.100.1": "slave"}


def test_a_network_with_a_nat_gateway_has_an_address_for_it(tmp_path: Path, edit):
    plan = Plan(0, tmp_path)
    assert with_world(NetworkModel(), load_world(), plan).gateways == {"vpc-dublin": "203.0.113.4"}
    none = load_world(edit("    natGateway: true\n", ""))
    assert with_world(NetworkModel(), none, plan).gateways == {}

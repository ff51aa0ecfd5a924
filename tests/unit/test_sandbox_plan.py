import json
import os
import subprocess
from pathlib import Path

import pytest

from sandbox import cli, machine, world
from sandbox import plan as plan_module
from sandbox.host import Cgroups, SandboxError
from sandbox.plan import SLOTS, Plan, check_ranges, checked_name, hold


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tree = tmp_path / "cgroup"
    groups = Cgroups(version=2, limits={"memory": tree, "cpu": tree}, trees=(tree,))
    monkeypatch.setattr(plan_module, "RUNTIME_ROOT", tmp_path / "run")
    # What runs on this machine is none of a test's business.
    monkeypatch.setattr(plan_module, "NETNS_DIR", tmp_path / "netns")
    monkeypatch.setattr(plan_module, "cgroups", lambda: groups)
    return tmp_path / "run"


def test_slots_share_no_name_and_no_address(tmp_path: Path):
    plans = [Plan(slot, tmp_path) for slot in range(SLOTS)]
    ranges = [network for plan in plans for network in plan.public_ranges]
    assert not any(a.overlaps(b) for a in ranges for b in ranges if a is not b)
    assert len({plan.inet_netns for plan in plans}) == SLOTS
    for plan in plans:
        assert plan.machine_netns("x").startswith(f"{plan.prefix}-")


def test_each_address_of_a_slot_has_one_purpose(tmp_path: Path):
    plan = Plan(1, tmp_path)
    used = [
        *(plan.operator_ip, plan.inet_ip, plan.releases_ip),
        *(*plan.nat_ips, *plan.temporary_ips, *plan.stranger_ips, *plan.eips),
    ]
    assert len(used) == len(set(used))


def test_link_names_fit_into_the_kernels_fifteen_characters(tmp_path: Path):
    plan = Plan(0, tmp_path)
    assert len(plan.link("r", "a-network-with-a-very-long-name")) <= 15
    assert len(plan.host_link) <= 15


def test_an_unknown_slot_is_refused(tmp_path: Path):
    with pytest.raises(SandboxError, match="no sandbox slot 9"):
        Plan(9, tmp_path)


@pytest.mark.parametrize("name", ["../etc", "", "A", "a/b", "-a", "a" * 51])
def test_a_name_that_is_no_file_name_is_refused(name: str):
    with pytest.raises(SandboxError, match="cannot be the name"):
        checked_name(name)


def routes(monkeypatch: pytest.MonkeyPatch, *rows: dict) -> None:
    answer = subprocess.CompletedProcess([], 0, json.dumps(rows), "")
    monkeypatch.setattr(plan_module, "run", lambda *_a, **_k: answer)


def test_a_range_that_the_machine_routes_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    routes(monkeypatch, {"dst": "198.51.100.16/28", "gateway": "192.0.2.9", "dev": "eth7"})
    with pytest.raises(SandboxError) as caught:
        check_ranges(Plan(0, tmp_path))
    assert "198.51.100.16/28 (gateway 192.0.2.9 dev eth7)" in str(caught.value)
    assert "ip route del 198.51.100.16/28" in caught.value.remedy


def test_own_and_unrelated_routes_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = Plan(0, tmp_path)
    own = {"dst": str(plan.eip_range), "dev": plan.host_link}
    routes(monkeypatch, own, {"dst": "default"}, {"dst": "10.0.0.0/8", "dev": "eth0"})
    check_ranges(plan, in_use=["10.255.255.53"])


def test_a_default_route_by_halves_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    halves = [{"dst": half, "dev": "tun0"} for half in ("0.0.0.0/1", "128.0.0.0/1")]
    routes(monkeypatch, *halves)
    check_ranges(Plan(0, tmp_path))
    routes(monkeypatch, *halves, {"dst": "198.0.0.0/8", "dev": "eth7"})
    with pytest.raises(SandboxError, match="already routes 198"):
        check_ranges(Plan(0, tmp_path))


def test_a_mirror_inside_our_range_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = Plan(0, tmp_path)
    routes(monkeypatch)
    with pytest.raises(SandboxError, match="package mirror"):
        check_ranges(plan, in_use=[str(plan.service_range[30])])


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path, runtime: Path):
    plan = Plan(0, tmp_path / "state")
    with hold(plan), pytest.raises(SandboxError) as caught, hold(plan):
        pass
    assert f"process {os.getpid()}" in str(caught.value)
    assert str(plan.state_dir) in str(caught.value)
    assert runtime.is_dir()
    with hold(plan):
        pass


@pytest.mark.usefixtures("runtime")
def test_a_slot_of_another_directory_is_refused_with_the_remedy(tmp_path: Path):
    first, second = Plan(0, tmp_path / "a/.sandbox"), Plan(0, tmp_path / "b/.sandbox")
    with hold(first):
        pass
    with pytest.raises(SandboxError, match="belongs to another directory") as caught, hold(second):
        pass
    assert f"make down` in {tmp_path / 'a'}" in caught.value.remedy


@pytest.mark.usefixtures("runtime")
def test_a_slot_whose_directory_is_gone_may_be_taken_over_to_remove_it(tmp_path: Path):
    first, second = Plan(0, tmp_path / "a/.sandbox"), Plan(0, tmp_path / "b/.sandbox")
    with hold(first):
        pass
    (first.state_dir / plan_module.MARKER).unlink()
    first.state_dir.rmdir()
    with pytest.raises(SandboxError, match="belongs to another directory"), hold(second):
        pass
    with hold(second, take_over=True):
        assert second.owner == second.state_dir


@pytest.mark.usefixtures("runtime")
def test_a_folder_of_the_users_gets_no_marker_and_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cli, "_become_root", lambda argv: None)
    monkeypatch.setattr(world, "destroy", lambda plan: pytest.fail("would remove it"))
    foreign = tmp_path / "documents"
    foreign.mkdir()
    (foreign / "letter").touch()
    with pytest.raises(SandboxError, match="has no file") as caught, hold(Plan(0, foreign)):
        pass
    assert "--state-dir" in caught.value.remedy
    assert cli.main(["--state-dir", str(foreign), "down"]) == 1
    assert "has no file" in capsys.readouterr().out
    assert [item.name for item in foreign.iterdir()] == ["letter"]
    # The slot is nobody's.
    assert Plan(0, foreign).owner is None


@pytest.mark.usefixtures("runtime")
def test_an_empty_folder_is_taken_and_shut_and_may_be_held_again(tmp_path: Path):
    plan = Plan(0, tmp_path / "empty")
    plan.state_dir.mkdir(mode=0o755)
    with hold(plan):
        assert plan.state_dir.stat().st_mode & 0o777 == 0o700
        (plan.state_dir / "state.json").touch()
    with hold(plan):
        assert (plan.state_dir / plan_module.MARKER).exists()


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("left", ["cgroup/pf3/core01/launcher", "netns/pf3-inet"])
def test_machines_whose_folder_was_removed_by_hand_are_not_mixed_with_new_keys(
    tmp_path: Path, left: str
):
    plan = Plan(3, tmp_path / "state")
    (tmp_path / left).mkdir(parents=True)
    # Another slot's are no hindrance.
    (tmp_path / "netns/pf30-inet").mkdir(parents=True)
    with hold(Plan(2, tmp_path / "other")):
        pass
    with pytest.raises(SandboxError, match=r"core01|pf3-inet"), hold(plan):
        pass
    with pytest.raises(SandboxError, match=r"core01|pf3-inet") as caught, hold(plan):
        pass
    assert "`make down`" in caught.value.remedy
    assert f"--slot 3 --state-dir {plan.state_dir} down" in caught.value.remedy
    with hold(plan, removing=True):
        assert plan.owner == plan.state_dir


@pytest.mark.usefixtures("runtime")
def test_down_frees_the_loop_devices_of_a_folder_that_was_removed_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    first, second = Plan(3, tmp_path / "first"), Plan(3, tmp_path / "second")
    with hold(first):
        pass
    (first.state_dir / plan_module.MARKER).unlink()
    first.state_dir.rmdir()
    (tmp_path / "netns/pf3-inet").mkdir(parents=True)
    # A refused `up` does not make it forgotten.
    with pytest.raises(SandboxError, match="pf3-inet"), hold(second, take_over=True):
        pass
    monkeypatch.setattr(cli, "_become_root", lambda argv: None)
    monkeypatch.setattr(world, "destroy", lambda plan: [])
    monkeypatch.setattr(
        machine, "release_loops_below", lambda folder: [f"of {folder}"] if folder else []
    )
    assert cli.main(["--slot", "3", "--state-dir", str(second.state_dir), "down"]) == 0
    assert f"loop device of {first.state_dir}" in capsys.readouterr().out.replace("\n", "")

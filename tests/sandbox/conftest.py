"""One sandbox for all tests of a session: the user's own commands bring it up and take it down.

It lives in a slot and a folder of its own, beside whatever `make up` runs.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from sandbox import host, machine, network, providers, stacks
from sandbox.network import Fabric
from sandbox.plan import Plan
from sandbox.program import plain
from sandbox.proof import MasterApi, Sample
from sandbox.state import Record, State
from tests.sandbox.keyring import Keyring
from tests.sandbox.probe import Client, Door, Request, ask

ROOT = Path(__file__).parents[2]
NAMESPACE = "prometheus-federation"

# The hosts that the slave monitors, as machines; and those that settings give by name alone, of
# which the program knows no address.
CORES = ("core01", "core02", "core03", "core04")
NAMED = ("core04",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs machines."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.machines)


@dataclass(kw_only=True)
class Sandbox:
    """A sandbox as a user has it, and a look behind the scenes for those who test it.

    `config` and `world` are what the next `up` will be given. `stack`: whose they are, where a
    sandbox has several.
    """

    plan: Plan
    config: dict[str, Any]
    world: dict[str, Any]
    stack: str = stacks.MAIN
    last: subprocess.CompletedProcess[str] | None = None
    log: list[str] = field(default_factory=list)

    @classmethod
    def fresh(cls, slot: int, folder: Path) -> Sandbox:
        """A sandbox that is not up yet, with the settings that `make up` has."""
        plan = Plan(slot=slot, state_dir=folder)
        config = yaml.safe_load((ROOT / "Pulumi.sandbox.yaml").read_text())["config"]
        # Each slot sees the operator under another address.
        config[f"{NAMESPACE}:operatorCidrs"] = [f"{plan.operator_ip}/32"]
        world = yaml.safe_load((ROOT / "sandbox" / "world.yaml").read_text())
        return cls(plan=plan, config=config, world=world)

    def set(self, **settings: Any) -> None:
        """Changes settings of ours, by their names without namespace."""
        for key, value in settings.items():
            self.config[f"{NAMESPACE}:{key}"] = value

    def get(self, key: str) -> Any:
        """A copy of a setting of ours, to change and `set`."""
        return copy.deepcopy(self.config[f"{NAMESPACE}:{key}"])

    def arguments(self, command: str, *more: str) -> list[str]:
        """The command line of a sandbox command."""
        base = [sys.executable, "-m", "sandbox", "--slot", str(self.plan.slot)]
        base += ["--state-dir", str(self.plan.state_dir), command]
        if command == "up":
            inputs = self.plan.state_dir.with_name(f"{self.plan.state_dir.name}-inputs")
            inputs.mkdir(exist_ok=True)
            config = inputs / f"{self.stack}.yaml"
            config.write_text(yaml.safe_dump({"config": self.config}))
            (inputs / "world.yaml").write_text(yaml.safe_dump(self.world))
            base += ["--stack", self.stack, "--config", str(config)]
            base += ["--world", str(inputs / "world.yaml")]
        return [*base, *more]

    def run(self, command: str, *more: str, timeout: float = 600) -> str:
        """Runs a sandbox command and returns what it printed; its exit code is in `last`."""
        self.last = subprocess.run(
            self.arguments(command, *more),
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        self.log.append(self.last.stdout)
        return self.last.stdout

    def up(self, *more: str) -> str:
        """`up`, which must succeed; returns what it printed."""
        printed = self.run("up", *more)
        assert self.last is not None
        assert self.last.returncode == 0, printed
        return printed

    def refused(self, *more: str) -> str:
        """`up`, which must fail; returns what it printed."""
        printed = self.run("up", *more)
        assert self.last is not None
        assert self.last.returncode == 1, printed
        return printed

    @property
    def state(self) -> State:
        return stacks.load(self.plan, self.stack)

    @property
    def outputs(self) -> Mapping[str, Any]:
        """The stack's outputs, secrets unwrapped."""
        return plain(self.state.outputs)

    def sent(self, command: str) -> dict[str, Any]:
        """What a remote command of the program's was given last, the connection included."""
        return plain(self._command(self.state, command).inputs)

    def forget(self, command: str) -> None:
        """The next `up` runs that remote command as if it never had."""
        state = self.state
        state.forget(self._command(state, command))

    def _command(self, state: State, name: str) -> Record:
        (found,) = (
            record
            for record in state.records.values()
            if record.type == providers.COMMAND and record.name == name
        )
        return found

    @property
    def master(self) -> MasterApi:
        """The master's API, as an operator uses it."""
        return MasterApi.of(self.state.outputs)

    def machine(self, name: str) -> str:
        """The machine behind `master`, a site's name, or a given host's."""
        found = [m for m in machine.machines(self.plan) if m == name]
        found += [
            m
            for m in machine.machines(self.plan)
            if m.startswith((f"{name}-", f"slave-{name}-")) and machine.is_running(self.plan, m)
        ]
        assert found, f"no machine {name}: {machine.machines(self.plan)}"
        return found[-1]

    def inside(self, name: str, *argv: str, stdin: str | None = None, check: bool = True) -> str:
        """What a program prints (stdout and stderr) when root runs it on a machine."""
        done = machine.exec(
            self.plan, self.machine(name), argv, stdin=stdin, check=check, timeout=120
        )
        return done.stdout + done.stderr

    def script(self, name: str, text: str, *, check: bool = True) -> str:
        """What a shell script prints when root runs it on a machine."""
        return self.inside(name, "bash", "-c", text, check=check)

    def namespace(self, name: str) -> str:
        """The network namespace of the machine behind a name."""
        return self.plan.machine_netns(self.machine(name))

    def private_ip(self, name: str) -> str:
        """The address of a machine in its network."""
        return self.fabric.model.attachments[self.machine(name)].private_ip

    def public_ip(self, name: str) -> str:
        """The Elastic IP of `master` or of a site's slave."""
        rows = {"master": self.outputs.get("master"), **self.outputs["slaves"]}
        return rows[name]["publicIp"]

    def query(self, promql: str) -> list[Sample]:
        """An instant query, asked of the master."""
        return self.master.query(promql)

    def stranger(self, name: str = "stranger") -> str:
        """The namespace of somebody on the internet with an address of its own."""
        return network.stranger(self.plan, name)

    def own_api(self, server: str, path: str, **parameters: str) -> Any:
        """The data of an answer of a server's own Prometheus, asked as it asks itself."""
        row = self.outputs["master"] if server == "master" else self.outputs["slaves"][server]
        request = Request(
            door=Door(address="127.0.0.1", port=9090, name=row["host"]),
            client=Keyring(self.state).own_client(server),
            path=f"/api/v1/{path}?{urlencode(parameters)}",
        )
        (answer,) = ask(self.namespace(server), [request])
        assert answer.short == 200, answer
        return json.loads(answer.body)["data"]

    @property
    def fabric(self) -> Fabric:
        return Fabric(self.plan)

    def accesses(self, server: str, since: float) -> list[dict[str, Any]]:
        """What a server's nginx wrote down since a moment."""
        command = f"journalctl --quiet --output=cat --identifier=nginx_access --since=@{since:.3f}"
        return [json.loads(line) for line in self.script(server, command).splitlines()]

    def start_times(self) -> dict[str, str]:
        """Of each service and kernel on our servers and on the hosts that they monitor: when it
        started. Same means: not restarted."""
        found: dict[str, str] = {}
        there = [core for core in CORES if core in machine.machines(self.plan)]
        for name in ("master", *self.outputs["slaves"], *there):
            units = "prometheus alertmanager oauth2-proxy nginx node_exporter ssh"
            found[name] = self.script(
                name,
                f"systemctl show -p Id,MainPID,ExecMainStartTimestamp {units};"
                "cat /proc/sys/kernel/random/boot_id",
            )
        return found

    def scrapes(self, selector: str, seconds: float) -> list[Sample]:
        """Every raw sample of the last seconds of one series, as the master stored it."""
        return self.master.samples(f"{selector}[{int(seconds)}s]")

    def wait(self, promql: str, *, seconds: float = 60) -> list[Sample]:
        """Waits until a query on the master has an answer."""
        found = host.wait_until(lambda: self.query(promql), seconds=seconds, step=0.5)
        assert found, f"{promql} had no answer within {seconds:g} s"
        return found


def no_scrape_lost(
    sandbox: Sandbox, selector: str, since: float, interval: float, *, rescheduled: bool = False
) -> None:
    """Fails if any scrape of one series since a moment failed or is missing.

    `rescheduled`: the job's own configuration changed meanwhile. Prometheus then gives the target
    another place within the interval, so that two scrapes may be almost two intervals apart.
    """
    now = time.time()
    samples = sandbox.scrapes(selector, now - since)
    assert samples, f"no sample of {selector}"
    assert {sample.value for sample in samples} == {1.0}
    times = [sample.timestamp for sample in samples]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    # Prometheus holds its rhythm to milliseconds; a lost scrape leaves a gap of two intervals.
    limit = interval * (1.99 if rescheduled else 1.5)
    assert max(gaps, default=0.0) < limit, json.dumps(gaps)
    # Nor is any missing at the ends. A busy machine, and federation, may take an interval more.
    assert times[0] - since < 3 * interval, "none at the beginning"
    assert now - times[-1] < 3 * interval, "none at the end"


def silence(comment: str) -> str:
    """What Alertmanager is sent for a silence of an hour, of an alert that there is not.

    https://github.com/prometheus/alertmanager/blob/main/api/v2/openapi.yaml
    """
    now = datetime.now(UTC)
    matcher = {"name": "alertname", "value": "NoSuchAlert", "isRegex": False}
    times = {"startsAt": now.isoformat(), "endsAt": (now + timedelta(hours=1)).isoformat()}
    return json.dumps({"matchers": [matcher], **times, "createdBy": "tests", "comment": comment})


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """The sandbox that all tests share; up, with the settings of Pulumi.sandbox.yaml."""
    slot = int(os.environ.get("SANDBOX_TEST_SLOT", "1"))
    keep = "SANDBOX_TEST_KEEP" in os.environ
    shared = Sandbox.fresh(slot, ROOT / f".sandbox-test{slot}")
    if not keep:
        shared.run("down")
    try:
        shared.up()
        yield shared
    finally:
        if not keep:
            shared.run("down")


@pytest.fixture(scope="module")
def own() -> Iterator[Sandbox]:
    """A sandbox for a module of faults, in the slot after the shared one's; not up yet."""
    slot = int(os.environ.get("SANDBOX_TEST_SLOT", "1")) + 1
    keep = "SANDBOX_TEST_KEEP" in os.environ
    mine = Sandbox.fresh(slot, ROOT / f".sandbox-test{slot}")
    # One interval less to wait for: speed is not what is tested here.
    mine.set(scrapeInterval="2s")
    if not keep:
        mine.run("down")
    try:
        yield mine
    finally:
        if not keep:
            mine.run("down")


@pytest.fixture(scope="module")
def keys(sandbox: Sandbox) -> Keyring:
    """The keys and passwords of the shared sandbox, as they are when a module's tests begin."""
    return Keyring(sandbox.state)


@pytest.fixture(scope="module")
def master_client(sandbox: Sandbox, keys: Keyring) -> Client:
    """Every key to 9095, as the master has them."""
    return keys.client(
        keys.leaf("master-prometheus"),
        sandbox.outputs["slaves"]["dublin"]["federationUser"],
        sandbox.outputs["federationPasswords"]["dublin"],
    )


@pytest.fixture(scope="module")
def federation(sandbox: Sandbox) -> Door:
    """The slave's port 9095."""
    return Door(address=sandbox.public_ip("dublin"), port=9095, name="prometheus-slave.example.com")


@pytest.fixture(scope="module")
def page(sandbox: Sandbox) -> Door:
    """The master's page."""
    return Door(address=sandbox.public_ip("master"), port=443, name="prometheus-master.example.com")


@pytest.fixture(scope="module")
def page_client(sandbox: Sandbox, keys: Keyring) -> Client:
    """An operator: no certificate, but a password."""
    return keys.client(None, sandbox.outputs["master"]["user"], sandbox.outputs["masterPassword"])

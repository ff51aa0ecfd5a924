"""The sandbox's command line: up, status, verify, snapshot, ssh, down."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pulumi
from rich.console import Console
from rich.table import Table

from hostfiles.model import Release
from sandbox import acme, aws_api, hashes, host, image, machine, releases, snapshots, stacks, world
from sandbox.aws import AwsProvider
from sandbox.command import CommandProvider
from sandbox.engine import Changes, Engine
from sandbox.host import SandboxError
from sandbox.image import Image
from sandbox.network import Fabric
from sandbox.plan import SLOTS, Plan, hold
from sandbox.program import Project, Secret, evaluate, plain, read_project
from sandbox.progress import Steps
from sandbox.proof import MasterApi, prove
from sandbox.random import RandomProvider
from sandbox.recorder import Recorder
from sandbox.releases import LocalRelease, Pin, ReleaseServer
from sandbox.state import State
from sandbox.tls import TlsProvider
from sandbox.world import World
from settings import NAMESPACE, RELEASES

HERE = Path(__file__).resolve().parent.parent
INTERRUPTED = 130
STOPPED = "stopped; `make up` goes on where this ended, `make down` removes all"


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    # Machines and name servers run as users of their own, and read what is made here. What is
    # secret says so itself.
    os.umask(0o022)
    parser = _parser()
    chosen = parser.parse_args(argv)
    if chosen.run is _ssh and not chosen.name:
        parser.error(
            "ssh: NAME is missing; name a machine that `make status` lists, "
            "such as: make ssh NAME=prometheus-master"
        )
    console = Console(highlight=False)
    try:
        host.require_platform()
        _become_root(argv if argv is not None else sys.argv[1:])
        return chosen.run(chosen, console)
    except KeyboardInterrupt:
        console.print(STOPPED)
        return INTERRUPTED
    except Exception as error:
        if not isinstance(error, (SandboxError, pulumi.RunError)) and chosen.trace:
            raise
        console.print(
            f"{type(error).__name__ if not str(error) else error}",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sandbox",
        description="Boots the environment of Pulumi.sandbox.yaml as real machines on this one.",
    )
    parser.add_argument("--slot", type=int, default=0, choices=range(SLOTS), help="which sandbox")
    parser.add_argument("--state-dir", type=Path, default=HERE / ".sandbox", help="its folder")
    parser.add_argument("--trace", action="store_true", help="show stack traces of errors")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="boot, or bring what runs to the settings; then verify")
    up.add_argument("--stack", default=stacks.MAIN, help="which stack of this sandbox")
    up.add_argument("--config", type=Path, help="its settings (default: Pulumi.<stack>.yaml)")
    up.add_argument("--world", type=Path, default=world.WORLD_FILE, help="the given world")
    up.add_argument("--no-verify", action="store_true", help="leave the proof of federation out")
    up.set_defaults(run=_up)

    commands.add_parser("status", help="what runs, and where to find it").set_defaults(run=_status)
    commands.add_parser("verify", help="prove again that federation works").set_defaults(
        run=_verify
    )
    snapshot = commands.add_parser(
        "snapshot", help="snapshots of the data volumes, as the lifecycle policy takes them"
    )
    snapshot.add_argument("name", nargs="?", help="of this host alone, as in `status`")
    snapshot.set_defaults(run=_snapshot)
    ssh = commands.add_parser("ssh", help="a shell on a machine")
    # Optional here, as argparse would ask for the command, too.
    ssh.add_argument("name", nargs="?", help="as in `status`: prometheus-master, core01, …")
    ssh.add_argument("command", nargs=argparse.REMAINDER, help="run this instead of a shell")
    ssh.set_defaults(run=_ssh)
    down = commands.add_parser("down", help="remove everything that `up` made")
    down.add_argument("--purge", action="store_true", help="the cached images and releases too")
    down.set_defaults(run=_down)
    return parser


def _become_root(argv: list[str]) -> None:
    if os.geteuid() == 0:
        return
    print(
        "sandbox: asking for root through sudo, to make machines, mounts, network links and "
        "firewall rules (all in namespaces of its own, but for one link and one table)",
        file=sys.stderr,
    )
    try:
        kept = "--preserve-env=SANDBOX_DEBIAN_MIRROR"
        os.execvp("sudo", ["sudo", kept, "--", sys.executable, "-m", "sandbox", *argv])  # noqa: S606
    except FileNotFoundError:
        raise SandboxError(
            "The sandbox needs root, and there is no sudo.", "Run the same command as root."
        ) from None


def _plan(chosen: argparse.Namespace) -> Plan:
    return Plan(slot=chosen.slot, state_dir=chosen.state_dir)


def _up(chosen: argparse.Namespace, console: Console) -> int:
    project = read_project(HERE, chosen.stack, stack_file=chosen.config)
    if project.encrypted:
        raise SandboxError(
            f"Encrypted, so only the Pulumi CLI can read it: {', '.join(project.encrypted)}.",
            "The sandbox has secrets of its own: leave it out, or write `{given: sshKey}`.",
        )
    given = world.load_world(chosen.world)
    plan = _plan(chosen)
    with hashes.remembered(stacks.hashes(plan, project.stack)) as asked, Steps(console) as steps:
        # Wrong settings are told before anything is built, installed or touched.
        checked = world.resolve_given(project.config, plan, given, stand_ins=True)
        with steps("Checking the settings"):
            evaluate(replace(project, config=checked), Recorder(partial(stacks.outputs, plan)))
        host.prepare(steps)
        with hold(plan, take_over=True):
            if given.acme:
                # What it signs with is known only once it runs.
                world.ensure_networks(plan, given, Fabric(plan))
                acme.ensure(plan, steps)
                aws_api.ensure(plan, given.zone.name, given.zone.id, steps)
            config = world.resolve_given(project.config, plan, given)
            project = replace(project, config=config)
            changes, state, config, local = _converge(plan, project, given, asked, steps, console)
            # For `verify`: what was asked for last, passwords of the user's included.
            state.settings = Secret(dict(config))
            state.save()
            _write_outputs(plan, stacks.folder(plan, chosen.stack), state.outputs)
            proof = None
            if not chosen.no_verify and "master" in state.outputs:
                proof = prove(state.outputs, config, project.name, steps)
    _show(plan, console)
    if proof:
        console.print("\n[bold]Proof of federation[/] (asked of the master)")
        for line in proof.found:
            console.print(f"  {line}", markup=False, soft_wrap=True)
    for release in local.values():
        console.print(
            f"{release.name} {release.version}: {release.origin}", markup=False, soft_wrap=True
        )
    console.print(f"{changes} in {steps.seconds:.1f} s")
    return 0


def _wanted(project: Project) -> dict[str, Release]:
    """The releases that these settings use, by their keys."""
    master = project.config.get(f"{project.name}:master") or {}
    return {key: pin for key, pin in RELEASES.items() if key != "oauth2Proxy" or "oauth2" in master}


def _converge(
    plan: Plan,
    project: Project,
    given: World,
    asked: dict[str, str],
    steps: Steps,
    console: Console,
) -> tuple[Changes, State, Mapping[str, Any], Mapping[str, LocalRelease]]:
    wanted = _wanted(project)
    cancelled = threading.Event()

    def stop(*_: object) -> None:
        if cancelled.is_set():
            # Whoever asks twice waits for no thread. The slot is held until the last has ended.
            console.print(STOPPED)
            os._exit(INTERRUPTED)
        cancelled.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with ThreadPoolExecutor() as side_by_side:
        fetching = side_by_side.submit(
            releases.ensure_releases,
            steps,
            [
                Pin(name=r.name, version=r.version, url=r.url, sha256=r.sha256)
                for r in wanted.values()
            ],
        )
        base = image.ensure_image(steps)
        local = fetching.result()
        base = replace(base, layers=(*releases.data_layers(), *base.layers))
        # The cached ones, but for those that the settings name.
        chosen = {
            key: {
                "version": local[pin.name].version,
                "sha256": local[pin.name].sha256,
                "url": local[pin.name].url,
            }
            for key, pin in wanted.items()
        } | dict(project.config.get(f"{project.name}:releases", {}))
        config = {**project.config, f"{project.name}:releases": chosen}
        for key, pin in wanted.items():
            if chosen[key]["sha256"] != local[pin.name].sha256:
                local[pin.name] = replace(
                    local[pin.name], version=chosen[key]["version"], origin="as the settings say"
                )
        fabric = Fabric(plan)
        world.ensure_networks(plan, given, fabric)
        hosts = side_by_side.submit(world.ensure_hosts, plan, given, steps)
        aws = AwsProvider(plan, given, fabric, base, steps)
        state = stacks.load(plan, project.stack)
        state.hashes = Secret(asked)
        known = {**stacks.every(plan), project.stack: state}.values()
        # What a killed run began and could not note down is begun anew.
        aws.forget_all_but({record.id for one in known for record in one.everything})
        started = aws.resume()
        engine = Engine(state, {}, aws.invoke, steps, partial(stacks.outputs, plan), cancelled)
        engine.providers = {
            "aws": aws,
            "tls": TlsProvider(),
            "random": RandomProvider(),
            "command": CommandProvider(cancelled, plan.runtime_dir / "ssh"),
        }
        with called_off_with(hosts, cancelled), ReleaseServer(plan):
            changes = engine.up(replace(project, config=config))
        changes.started = [*hosts.result(), *started]
    return changes, state, config, local


@contextmanager
def called_off_with(hosts: Future[Any], cancelled: threading.Event) -> Iterator[None]:
    """What this block does is called off when the hosts fail, whose reason is told then.

    When the block fails, too: only hosts that boot are waited for from there on.
    """

    def heed(done: Future[Any]) -> None:
        if done.exception():
            cancelled.set()

    hosts.add_done_callback(heed)
    try:
        yield
    except BaseException as error:
        cancelled.set()
        # It would wait for them in vain, and name only what it waited for.
        if isinstance(error, Exception) and hosts.done() and (reason := hosts.exception()):
            raise reason from error
        raise


def _write_outputs(plan: Plan, stack: Path, outputs: Mapping[str, Any]) -> None:
    """What an operator needs as files: never on the screen, readable by their owner alone."""
    known = plain(outputs)
    folder = stack / "outputs"
    folder.mkdir(mode=0o700, exist_ok=True)
    files = {
        "ca.pem": known["caCertificate"],
        "operator.key": known["sshPrivateKey"],
        "known_hosts": "".join(f"{row['publicIp']} {row['sshHostKey']}" for row in _servers(known)),
    }
    if "master" in known:
        master = known["master"]
        files["master.curl"] = (
            f'{_login(known)}cacert = "{folder / "ca.pem"}"\n'
            # A public authority's certificate is of the name alone, which only the sandbox knows.
            f'resolve = "{master["host"]}:443:{master["publicIp"]}"\n'
        )
    for name, content in files.items():
        path = folder / name
        if not path.exists() or path.read_text() != content:
            path.touch(mode=0o600)
            path.write_text(content)
    # Whoever asked through sudo shall be able to use them: the rest stays root's.
    for part in ("machines", "volumes", "world"):
        (plan.state_dir / part).chmod(0o700)
    for part in (stack, *stack.parents):
        if part.is_relative_to(plan.state_dir):
            part.chmod(0o711)
    for path in (folder, *folder.iterdir()):
        os.chown(path, int(os.environ.get("SUDO_UID", "0")), int(os.environ.get("SUDO_GID", "0")))


def _login(known: Mapping[str, Any]) -> str:
    """How curl comes in at the master: by the password, or else by the first token if any."""
    if "masterPassword" in known:
        return f'user = "{known["master"]["user"]}:{known["masterPassword"]}"\n'
    tokens = list(known["masterTokens"].values())
    return "".join(f'header = "Authorization: Bearer {token}"\n' for token in tokens[:1])


def _show(plan: Plan, console: Console) -> bool:
    """Prints what there is; returns whether all of it runs."""
    states = stacks.every(plan)
    model = Fabric(plan).model
    public = {holder: address for address, holder in model.eips.items() if holder}
    table = Table("machine", "private", "public", "memory", "state", box=None)
    well = bool(model.attachments)
    rows = [row for state in states.values() for row in _servers(state.outputs)]
    names = {row["publicIp"]: _name(row) for row in rows}
    for name, attachment in sorted(model.attachments.items()):
        running = machine.is_running(plan, name)
        well &= running
        used, limit = machine.memory_bytes(plan, name) if running else (0, 0)
        table.add_row(
            names.get(public.get(name, ""), name),
            attachment.private_ip,
            public.get(name, "-"),
            f"{used >> 20}/{limit >> 20} MiB" if running else "-",
            "running" if running else "stopped",
            style="" if running else "red",
        )
    console.print(table)
    for stack, state in states.items():
        if "master" in state.outputs:
            _tell_master(stacks.folder(plan, stack) / "outputs", state, console)
    return well


def _servers(outputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a stack's outputs say of each of its servers."""
    known = plain(outputs)
    return [*known.get("slaves", {}).values(), *([known["master"]] if "master" in known else [])]


def _name(server: Mapping[str, Any]) -> str:
    """What commands call a server."""
    return server["host"].partition(".")[0]


def _tell_master(folder: Path, state: State, console: Console) -> None:
    master = plain(state.outputs)["master"]
    address = master["publicIp"]
    try:
        pages = MasterApi.of(state.outputs).has_pages()
    except (httpx.HTTPError, SandboxError):
        pages = False
    lines = [
        f"query     curl -K {folder / 'master.curl'} "
        f"'https://{master['host']}/api/v1/query?query=up'",
        f"user      {master['user']}, password in {folder / 'master.curl'}"
        if "user" in master
        else "user      people log in at the provider of the settings",
        f"shell     make ssh NAME={_name(master)}",
    ]
    if pages:
        lines.insert(
            0, f"web page  https://{address}/ (the browser must trust {folder / 'ca.pem'})"
        )
    else:
        lines.insert(0, "web page  none: Debian's build of Prometheus has no pages; query its API")
    console.print("", *lines, sep="\n", markup=False, soft_wrap=True)


def _status(chosen: argparse.Namespace, console: Console) -> int:
    plan = _plan(chosen)
    _states(plan)
    return 0 if _show(plan, console) else 1


def _verify(chosen: argparse.Namespace, console: Console) -> int:
    with_master = [s for s in _states(_plan(chosen)).values() if "master" in s.outputs]
    if not with_master:
        raise SandboxError("No stack has a master to ask.", "Bring one up that has.")
    for state in with_master:
        with Steps(console) as steps:
            proof = prove(state.outputs, plain(state.settings), NAMESPACE, steps)
        for line in proof.found:
            console.print(f"  {line}", markup=False, soft_wrap=True)
    return 0


def _snapshot(chosen: argparse.Namespace, console: Console) -> int:
    plan = _plan(chosen)
    rows = [row for state in _states(plan).values() for row in _servers(state.outputs)]
    ours = {_name(row): row["publicIp"] for row in rows}
    if chosen.name and chosen.name not in ours:
        raise SandboxError(
            f"There is no host {chosen.name!r}.", f"Name one of: {', '.join(sorted(ours))}."
        )
    with Steps(console) as steps, hold(plan):
        given = world.load_world()
        aws = AwsProvider(plan, given, Fabric(plan), Image(name="", layers=()), steps)
        taken = aws.run_policies(ours.get(chosen.name))
    if not taken:
        raise SandboxError("No lifecycle policy names a volume.", "Set backup: {keep: 7}, `up`.")
    table = Table("snapshot", "of", "taken", "GiB", "on disk", box=None)
    for row in snapshots.every(plan):
        table.add_row(
            row.id,
            row.name,
            datetime.fromtimestamp(row.time, UTC).isoformat(" ", "seconds"),
            str(row.size_gib),
            f"{snapshots.on_disk(plan, row) >> 20} MiB",
        )
    console.print(table)
    return 0


def _states(plan: Plan) -> dict[str, State]:
    states = stacks.every(plan)
    if not states:
        raise SandboxError("Nothing is up.", "Boot it with `make up`.")
    return states


def _ssh(chosen: argparse.Namespace, console: Console) -> int:
    plan = _plan(chosen)
    ours = {
        _name(row): (row, stacks.folder(plan, stack) / "outputs")
        for stack, state in _states(plan).items()
        for row in _servers(state.outputs)
    }
    if chosen.name in ours:
        row, folder = ours[chosen.name]
        user = row["sshCommand"].split()[-1].partition("@")[0]
        argv = ["ssh", "-F", "none", "-i", str(folder / "operator.key"), "-o", "IdentitiesOnly=yes"]
        argv += ["-o", f"UserKnownHostsFile={folder / 'known_hosts'}"]
        argv += ["-o", "StrictHostKeyChecking=yes", f"{user}@{row['publicIp']}", *chosen.command]
    elif machine.is_running(plan, chosen.name):
        # A given host has no public address: in at its console, as through a rescue shell.
        argv = machine.command_inside(plan, chosen.name, chosen.command or ["bash", "-l"])
    else:
        known = sorted({*ours, *machine.machines(plan)})
        raise SandboxError(
            f"There is no running machine {chosen.name!r}.", f"Name one of: {', '.join(known)}."
        )
    console.file.flush()
    os.execvp(argv[0], argv)  # noqa: S606


def _down(chosen: argparse.Namespace, console: Console) -> int:
    plan = _plan(chosen)
    # Holding the slot makes these; they do not count as found.
    held = {f"folder {p}" for p in (plan.state_dir, plan.runtime_dir) if not p.exists()}
    before = plan.owner
    with hold(plan, take_over=True, removing=True):
        removed = [line for line in world.destroy(plan) if line not in held]
        if before not in (None, plan.state_dir):
            # Of a folder that was removed by hand: the files are gone, the devices are not.
            removed += [f"loop device {name}" for name in machine.release_loops_below(before)]
    if chosen.purge:
        removed += world.purge(
            {slot: Plan(slot=slot, state_dir=plan.state_dir) for slot in range(SLOTS)}
        )
    for line in removed:
        console.print(f"removed {line}", markup=False)
    console.print("nothing was up" if not removed else "all is gone")
    return 0

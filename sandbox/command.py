"""The command provider: remote commands, over real SSH, from this machine.

https://www.pulumi.com/registry/packages/command/api-docs/remote/command/
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from hostfiles.duration import milliseconds
from sandbox.program import Resource
from sandbox.providers import Inputs, Outputs, Provider

# OpenSSH's own exit code, for a connection that failed (and a command may end with it, too).
_SSH_FAILED = 255
# What a provider's connection has unless it says otherwise.
_DIAL_SECONDS = 15
_DIAL_LIMIT = 10
# How soon a call to stop is heard.
_STEP_SECONDS = 0.2

_EVERY_HOST = {
    "BatchMode": "yes",
    "GlobalKnownHostsFile": "/dev/null",
    "IdentitiesOnly": "yes",
    "IdentityAgent": "none",
    "ServerAliveInterval": "15",
    "StrictHostKeyChecking": "yes",
}

# What ssh says when it cannot connect: the reason, and the host where the line names it. The
# first that is found tells most; "UNKNOWN" is how ssh calls a host behind a jump.
_REASONS = (
    re.compile(r"ssh: connect to host (?P<host>\S+) port \d+: (?P<reason>.+)"),
    re.compile(r"ssh: (?P<reason>Could not resolve hostname (?P<host>[^\s:]+).*)"),
    re.compile(r"Host key for (?P<host>\S+) has changed and you have requested strict"),
    re.compile(r"No \S+ host key is known for (?P<host>\S+) and you have requested strict"),
    re.compile(r"\S+@(?P<host>[^\s@:]+): (?P<reason>Permission denied.*)"),
    re.compile(r"channel \d+: open failed: (connect failed: )?(?P<reason>.+)"),
    re.compile(r"(?P<reason>Connection timed out) during banner exchange"),
    re.compile(
        r"(?P<reason>Connection (closed|reset|timed out).*) by (\S+@)?(?P<host>[\d.]+) port"
    ),
    re.compile(r"(?P<reason>Connection (closed|reset) by (remote host|peer))"),
)


class CommandError(Exception):
    """The command ran and failed, or its host could not be reached in time."""


class CommandProvider(Provider):
    """Runs `create`, and `update` (else `create` again) when an input changed.

    `cancelled`, once set, ends all waiting, for hosts and for commands. `folder` is for what each
    ssh needs while it runs, keys among it: what a killed run left there is removed now.
    """

    def __init__(self, cancelled: threading.Event, folder: Path) -> None:
        self._cancelled = cancelled
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)

    def create(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        """Runs the command for the first time."""
        output = self._run(
            resource.name, inputs, inputs["create"], _seconds(resource.timeout_create)
        )
        return f"command-{resource.name}", output

    def update(
        self,
        resource: Resource,
        id_: str,
        inputs: Inputs,
        old: Inputs,
        outputs: Outputs,
    ) -> Outputs:
        """Runs it again with the new inputs."""
        command = inputs.get("update") or inputs["create"]
        return self._run(resource.name, inputs, command, _seconds(resource.timeout_update))

    def delete(self, type_: str, id_: str, inputs: Inputs, timeout: str) -> None:
        """Runs `delete`, where there is one, over the connection that the command had last."""
        if inputs.get("delete"):
            name = id_.removeprefix("command-")
            self._run(name, inputs, inputs["delete"], _seconds(timeout))

    def _run(self, name: str, inputs: Inputs, command: str, timeout: float) -> Outputs:
        connection = inputs["connection"]
        limit = connection.get("dialErrorLimit", _DIAL_LIMIT)
        deadline = time.monotonic() + timeout
        failed, reason = 0, "no answer"
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            config = write_config(Path(folder), connection)
            argv = ["ssh", "-F", str(config), "-T", "target", command]
            while True:
                done = self._ssh(argv, inputs.get("stdin") or "", deadline)
                if done is None or done.returncode == _SSH_FAILED:
                    connected = Path(folder, "connected").exists()
                else:
                    connected = True
                if done is None and connected:
                    raise CommandError(
                        f"{name}: the command on {connection['host']} did not end within "
                        f"{timeout:g} s; see the host's journal"
                    )
                if done is not None and connected:
                    if done.returncode == 0:
                        return {"stdout": done.stdout, "stderr": done.stderr}
                    raise CommandError(
                        f"{name}: the command on {connection['host']} exited with "
                        f"{done.returncode}:\n{done.stderr.strip() or done.stdout.strip()}"
                    )
                if done is not None:
                    failed += 1
                    reason = why_unreachable(done.stderr, connection)
                # As the provider does with dialErrorLimit -1: try until the time is up.
                if done is None or 0 <= limit < failed or time.monotonic() + 1 > deadline:
                    raise CommandError(
                        f"{name}: {connection['host']} could not be reached over SSH within "
                        f"{timeout:g} s: {reason}"
                    )
                self._cancelled.wait(0.3)

    def _ssh(
        self, argv: list[str], stdin: str, deadline: float
    ) -> subprocess.CompletedProcess[str] | None:
        """Runs ssh to its end; None when that did not come before the deadline."""
        with (
            # Not a pipe: communicate() writes nothing more after its first timeout.
            tempfile.TemporaryFile("w+") as text,
            # In a session of its own: it ends when we say so, with the ssh that it jumps through.
            subprocess.Popen(
                argv,
                stdin=_rewound(text, stdin),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            ) as process,
        ):
            try:
                while not self._cancelled.is_set() and time.monotonic() < deadline:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        stdout, stderr = process.communicate(timeout=_STEP_SECONDS)
                        return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)
            finally:
                # Also when Ctrl-C reaches this very thread.
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        if self._cancelled.is_set():
            raise InterruptedError("stopped before this was done; `up` again finishes it")
        return None


def _rewound(file: IO[str], text: str) -> IO[str]:
    file.write(text)
    file.seek(0)
    return file


def write_config(folder: Path, connection: Mapping[str, Any]) -> Path:
    """Writes what ssh needs for a connection into a folder, and returns its configuration.

    The host is called `target` there, and the one that it is reached through `jump`. When the
    target has let us in, and not before, the file `connected` is in the folder.
    """
    proxy = connection.get("proxy")
    dial = int(connection.get("perDialTimeout", _DIAL_SECONDS))
    sections = []
    if proxy:
        dial_proxy = int(proxy.get("perDialTimeout", _DIAL_SECONDS))
        sections.append(_section(folder, "jump", proxy, dial_proxy))
        # It begins to count before the jump is connected.
        dial = dial + dial_proxy if dial and dial_proxy else 0
    target = _section(folder, "target", connection, dial)
    target |= {"PermitLocalCommand": "yes", "LocalCommand": f"touch {folder / 'connected'}"}
    if proxy:
        target["ProxyJump"] = "jump"
    sections.append(target)
    config = folder / "config"
    config.write_text(
        "".join(
            "".join(f"{key} {value}\n" for key, value in section.items()) for section in sections
        )
    )
    return config


def _section(folder: Path, name: str, connection: Mapping[str, Any], dial: int) -> dict[str, str]:
    host, port = _word(connection["host"]), int(connection.get("port", 22))
    if not connection.get("hostKey"):
        raise CommandError(f"the connection to {host} has no hostKey: it could be anybody")
    key, known = folder / f"{name}.key", folder / f"{name}.known_hosts"
    key.touch(mode=0o600)
    # ssh reads no key whose last line does not end.
    key.write_text(connection["privateKey"].rstrip("\n") + "\n")
    called = host if port == 22 else f"[{host}]:{port}"
    known.write_text(f"{called} {connection['hostKey'].strip()}\n")
    return {
        "Host": name,
        "HostName": host,
        "Port": str(port),
        "User": _word(connection.get("user", "root")),
        "IdentityFile": str(key),
        "UserKnownHostsFile": str(known),
        **({"ConnectTimeout": str(dial)} if dial else {}),
        **_EVERY_HOST,
    }


def _word(value: Any) -> str:
    """A host or user as it may stand in ssh's configuration, in which `%` and blanks mean more."""
    if not re.fullmatch(r"[\w.:@+-]+", str(value)):
        raise CommandError(f"{value!r} cannot be the name of a host or user")
    return str(value)


def why_unreachable(stderr: str, connection: Mapping[str, Any]) -> str:
    """Says, of what ssh said when it could not connect, the reason and which host it is about."""
    proxy = connection.get("proxy")
    for pattern in _REASONS:
        if found := pattern.search(stderr):
            parts = found.groupdict()
            reason = parts.get("reason") or "Host key verification failed"
            if not proxy:
                return reason.strip()
            # With a port, a known host is called [host]:port.
            host = (parts.get("host") or "").strip("[").partition("]")[0]
            if host == proxy["host"] or f"Connection to {proxy['host']} port" in stderr:
                return f"the jump host {proxy['host']}: {reason.strip()}"
            return f"{reason.strip()} (through the jump host {proxy['host']})"
    return (stderr.strip() or "no answer").splitlines()[-1].strip()


def _seconds(timeout: str) -> float:
    """Seconds of a duration such as `900s`; the provider's default is 20 minutes."""
    return milliseconds(timeout) / 1000 if timeout else 1200.0

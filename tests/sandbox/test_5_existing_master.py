"""A Prometheus that somebody else runs federates the slaves, beside the master of our own.

It is made by hand here, on a given host in a network of its own: the distribution knows nothing of
it, its configuration is oddly written, and it scrapes itself every second.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostfiles import existing_master
from sandbox import machine
from sandbox.host import wait_until
from sandbox.releases import tool
from sandbox.world import USER
from tests.sandbox.conftest import Sandbox
from tests.sandbox.test_6_interrupted import Step, killed_at

HUB = "hub"
HOST = f"{HUB}.elsewhere.example"
CONFIG = """\
# Central monitoring.  Since 2019; ask Ada before you change anything!
global: {scrape_interval: 1s,   scrape_timeout: 1s}


scrape_configs:
-   job_name: "own"        # itself
    metrics_path:   /prom/metrics
    static_configs:
    - targets: ['127.0.0.1:9090']
      labels: { team:   ops }

  # Twice, as it was always so.
- {job_name: again, metrics_path: "/prom/metrics", static_configs: [{targets: ["127.0.0.1:9090"]}]}
# The end, without an end of its line"""
WITH_LINE = (
    f"{CONFIG}\nscrape_config_files: [federate.d/*.yml]"
    "  # added by prometheus-federation, and removed with it\n"
)
UNIT = """\
[Service]
User=prom
ExecStart=/usr/local/bin/prometheus --config.file=/srv/mon/conf/prom.yaml \
    --storage.tsdb.path=/srv/mon/data --web.external-url=http://hub/prom/
ExecReload=/bin/kill -HUP $MAINPID
[Install]
WantedBy=multi-user.target
"""
SETUP = f"""set -eu
useradd --system prom
mkdir -p /srv/mon/conf/federate.rules /srv/mon/data
printf %s "$1" >/srv/mon/conf/prom.yaml
printf %s "$2" >/etc/systemd/system/mon.service
chown -R prom: /srv/mon; chmod 0640 /srv/mon/conf/prom.yaml
python3 -c 'import os; os.setxattr("/srv/mon/conf/prom.yaml", "user.note", b"kept")'
touch -d 2024-02-03T04:05:06.789 /srv/mon/conf/prom.yaml
systemctl daemon-reload; systemctl enable --now --quiet mon.service
runuser -u {USER} -- sudo true"""
# All that could be touched, with what it is; but for folders whose dates an undo changes.
SNAPSHOT = r"""
find /srv/mon/conf /opt /etc /usr/local -xdev -not -path '/etc/.pwd.lock' \
    -printf '%p %y %m %U %G %l ' \( -type f -printf '%T@ ' -exec sha256sum {} \; \
    -o -printf '\n' \)
python3 -c 'import os
for folder, _, names in os.walk("/srv/mon/conf"):
    for path in [folder, *(os.path.join(folder, name) for name in sorted(names))]:
        print(path, [(name, os.getxattr(path, name)) for name in sorted(os.listxattr(path))])'
"""


def settings(**change: Any) -> dict[str, Any]:
    return {
        "host": HOST,
        # An address is a network of one.
        "cidrs": [{"given": f"{HOST}/publicAddress"}],
        "access": {
            "host": {"given": f"{HOST}/publicAddress"},
            "user": USER,
            "privateKey": {"given": "sshKey"},
            "hostKey": {"given": HOST},
        },
        "configFile": "/srv/mon/conf/prom.yaml",
        "runAs": "prom",
        "unit": "mon.service",
        "url": "http://127.0.0.1:9090/prom",
        **change,
    }


@pytest.fixture(scope="module")
def hub(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The shared sandbox, whose world has a Prometheus more."""
    sandbox.world["networks"].append(
        {
            "id": "vpc-elsewhere",
            "cidr": "10.40.0.0/16",
            "subnets": {"subnet-elsewhere": "10.40.1.0/24"},
        }
    )
    sandbox.world["hosts"].append(
        {
            "name": HOST,
            "subnet": "subnet-elsewhere",
            "address": "10.40.1.11",
            "memoryMib": 512,
            "public": True,
        }
    )
    sandbox.up()
    leader = machine.leader_pid(sandbox.plan, HUB)
    for name in ("prometheus", "promtool"):
        path = Path(f"/proc/{leader}/root/usr/local/bin/{name}")
        if not path.exists():
            shutil.copy(tool(name), path)
    if "no such user" in sandbox.inside(HUB, "id", "prom", check=False):
        sandbox.inside(HUB, "bash", "-c", SETUP, "setup", CONFIG, UNIT)
    assert wait_until(lambda: query(sandbox, 'up{job="own"} == 1'), seconds=60, step=0.5)
    yield sandbox
    # First its jobs go, while it is there; its host goes with the next `up`.
    sandbox.set(existingMaster={})
    sandbox.up()
    sandbox.world["hosts"] = [row for row in sandbox.world["hosts"] if row["name"] != HOST]
    sandbox.world["networks"] = [
        row for row in sandbox.world["networks"] if row["id"] != "vpc-elsewhere"
    ]


def query(sandbox: Sandbox, promql: str) -> list[dict[str, Any]]:
    """An instant query of it, asked on its host."""
    fetch = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())"
    url = "http://127.0.0.1:9090/prom/api/v1/query?query="
    quoted = "".join(f"%{byte:02x}" for byte in promql.encode())
    answer = sandbox.inside(HUB, "python3", "-c", fetch, url + quoted, check=False)
    try:
        return json.loads(answer)["data"]["result"]
    except ValueError:
        return []


def config(sandbox: Sandbox) -> str:
    return sandbox.inside(HUB, "cat", "/srv/mon/conf/prom.yaml")


def process(sandbox: Sandbox) -> str:
    return sandbox.inside(
        HUB, "systemctl", "show", "-p", "MainPID,ExecMainStartTimestamp", "mon.service"
    )


def reloaded(sandbox: Sandbox) -> str:
    (found,) = query(sandbox, "prometheus_config_last_reload_success_timestamp_seconds{job='own'}")
    return found["value"][1]


def no_scrape_missed(sandbox: Sandbox, since: float) -> None:
    """Its own jobs, every second since that moment."""
    seconds = int(time.time() - since)
    for job in ("own", "again"):
        (series,) = query(sandbox, f'up{{job="{job}"}}[{seconds}s]')
        times = [moment for moment, _ in series["values"]]
        assert {value for _, value in series["values"]} == {"1"}
        assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 1.9
        assert len(times) >= seconds - 2


def test_the_sites_come_to_it_and_it_is_left_as_it_was(hub: Sandbox) -> None:
    sandbox, began = hub, time.time()
    before, runs = sandbox.script(HUB, SNAPSHOT), process(hub)
    assert "prom.yaml" in before
    sandbox.set(existingMaster=settings())
    sandbox.up()
    assert config(sandbox) == WITH_LINE
    assert query(sandbox, 'up{job="federate",site="dublin"} == 1')
    for number in range(1, 5):
        core = (
            f'up{{job="CoreSystems",site="dublin",instance="core0{number}.example.internal:9100"}}'
        )
        assert query(sandbox, core)
    # Our own master federates it as before.
    assert sandbox.query('up{job="federate",site="dublin"} == 1')

    there, moment = sandbox.script(HUB, SNAPSHOT), reloaded(sandbox)
    assert "no changes" in sandbox.up()
    sandbox.forget(existing_master.NAME)
    sandbox.up()
    assert sandbox.script(HUB, SNAPSHOT) == there, "a delivery that was made already"
    assert reloaded(sandbox) == moment

    sandbox.set(existingMaster={})
    assert "delete Command existing-master" in sandbox.up()
    assert sandbox.script(HUB, SNAPSHOT) == before
    assert config(sandbox) == CONFIG
    assert reloaded(sandbox) != moment
    # Prometheus shows the last samples of a job that is gone for minutes; no new ones come.
    newer = 'time() - timestamp(up{job="federate"}) < 5'
    assert wait_until(lambda: not query(sandbox, newer), seconds=30, step=0.5)
    no_scrape_missed(sandbox, began)
    assert process(sandbox) == runs, "reloaded, not restarted"


def deliver(sandbox: Sandbox, delivery: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return machine.exec(
        sandbox.plan,
        HUB,
        ["sh", "-c", existing_master.INSTALL],
        stdin=json.dumps(delivery),
        check=False,
        timeout=120,
    )


def sent(sandbox: Sandbox) -> dict[str, Any]:
    """What the program sent it last."""
    return json.loads(sandbox.sent(existing_master.NAME)["stdin"])


def test_what_goes_wrong_goes_back_and_says_why(hub: Sandbox) -> None:
    sandbox = hub
    before = sandbox.script(HUB, SNAPSHOT)
    # Before it is ours: an old promtool, then a password that the slave does not know.
    sandbox.script(
        HUB,
        "printf '#!/bin/sh\\necho promtool, version 2.42.0' >/srv/promtool; chmod +x /srv/promtool",
    )
    sandbox.set(existingMaster=settings(promtool="/srv/promtool"))
    told = sandbox.refused()
    assert "is version 2.42, and scrape_config_files came with 2.43: upgrade it" in told
    assert sandbox.script(HUB, SNAPSHOT) == before

    began = time.time()
    sandbox.set(existingMaster=settings())
    sandbox.up()
    there, delivery = sandbox.script(HUB, SNAPSHOT), sent(sandbox)
    (name,) = (name for name in delivery["files"] if name.endswith(".password"))
    text = json.dumps(delivery).replace(name, f"other-{name}")
    wrong = json.loads(text)
    wrong["files"][f"other-{name}"] = "wrong-wrong-wrong-wrong-wrong"
    done = deliver(sandbox, wrong)
    assert done.returncode == 1
    assert "server returned HTTP status 401 Unauthorized" in done.stderr
    assert "What was there before is back in force" in done.stderr
    after = sandbox.script(HUB, SNAPSHOT).splitlines()
    changed = set(there.splitlines()) ^ set(after)
    # Written back, with another date.
    assert {line.split()[0].rpartition("/")[2] for line in changed} <= {"dublin.yml", "undo.json"}
    up = 'up{job="federate",site="dublin"} == 1'
    assert wait_until(lambda: query(sandbox, up), seconds=40, step=0.5)
    no_scrape_missed(sandbox, began)


# Of prometheus.yml: before the other text takes its place, and after.
SWAP = (
    ("shutil.py", "copystat", "/srv/mon/conf/.prom.yaml.federation"),
    (existing_master.NAME, "sync", "PosixPath('/srv/mon/conf')"),
)
INSTALL_STEPS = (
    (existing_master.NAME, "write_program", "/opt/.federation-master"),
    (existing_master.NAME, "write_files", ""),
    *SWAP,
    (existing_master.NAME, "reload", ""),
    (existing_master.NAME, "wait_until_up", ""),
    (existing_master.NAME, "commit", ""),
)
REMOVE_STEPS = (
    (existing_master.NAME, "take_line_out", ""),
    *SWAP,
    (existing_master.NAME, "reload", ""),
    ("pathlib/_local.py", "rename", "/opt/.federation-master"),
    # Its second call: the first is that of what a killed one left.
    ("shutil.py", "rmtree", "PosixPath('/opt/.federation-master'), 'ignore_errors': False"),
)


def test_killed_at_its_steps_its_file_is_old_or_new_and_the_next_up_finishes(hub: Sandbox) -> None:
    sandbox, began = hub, time.time()
    sandbox.set(existingMaster=settings())
    sandbox.up()
    delivery = sent(sandbox)

    def kill(steps: tuple[tuple[str, str, str], ...], command: str, stdin: str = "") -> None:
        for program, function, about in steps:
            step = Step(function, about, HUB, program=program)
            killed_at(sandbox, step, "sh", "-c", command, stdin=stdin)
            assert config(sandbox) in (CONFIG, WITH_LINE), step

    sandbox.script(HUB, existing_master.remove(delivery["owner"]))
    sandbox.forget(existing_master.NAME)
    assert config(sandbox) == CONFIG
    bare = sandbox.script(HUB, SNAPSHOT)

    kill(INSTALL_STEPS, existing_master.INSTALL, json.dumps(delivery))
    assert sandbox.script(HUB, SNAPSHOT) != bare
    sandbox.up()
    assert config(sandbox) == WITH_LINE
    delivery = sent(sandbox)
    files = sandbox.inside(HUB, "ls", "/srv/mon/conf/federate.d/files").split()
    assert sorted(files) == sorted(delivery["files"])
    assert query(sandbox, 'up{job="federate",site="dublin"} == 1')
    assert "no changes" in deliver(sandbox, delivery).stdout

    kill(REMOVE_STEPS, existing_master.remove(delivery["owner"]))
    sandbox.set(existingMaster={})
    sandbox.up()
    assert sandbox.script(HUB, SNAPSHOT) == bare
    no_scrape_missed(sandbox, began)


def test_what_its_owner_wrote_since_stays(hub: Sandbox) -> None:
    sandbox = hub
    sandbox.set(existingMaster=settings())
    sandbox.up()
    sandbox.script(HUB, "echo '# Ada was here' >>/srv/mon/conf/prom.yaml")
    assert "no changes" in deliver(sandbox, sent(sandbox)).stdout
    sandbox.set(existingMaster={})
    sandbox.up()
    assert config(sandbox) == f"{CONFIG}\n# Ada was here\n"
    left = sandbox.script(HUB, "ls -A /srv/mon/conf; ls -A /opt")
    assert "federat" not in left.replace("federate.rules", "")

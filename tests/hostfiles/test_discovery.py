"""Discovered targets, as the real Prometheus labels them: by file, and by tag of EC2 instances."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from hostfiles import slave
from hostfiles.model import ServerSecrets, SlaveServer
from job_settings import TARGET_FILES, JobSettings
from sandbox.host import wait_until
from sandbox.releases import tool
from tests.hostfiles.conftest import ToolImage

pytestmark = pytest.mark.machines

# What EC2 answers to DescribeInstances.
# https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeInstances.html
INSTANCES = """<?xml version="1.0" encoding="UTF-8"?>
<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">
 <reservationSet><item><ownerId>1</ownerId><instancesSet><item>
  <instanceId>i-0abc</instanceId><imageId>ami-0abc</imageId>
  <instanceType>t3.micro</instanceType><architecture>x86_64</architecture>
  <subnetId>subnet-0abc</subnetId><vpcId>vpc-0abc</vpcId>
  <privateDnsName>ip-10-0-0-50</privateDnsName><dnsName></dnsName><privateIpAddress>10.0.0.50</privateIpAddress>
  <placement><availabilityZone>eu-west-1a</availabilityZone></placement>
  <instanceState><code>16</code><name>running</name></instanceState>
  <tagSet><item><key>Name</key><value>web one</value></item>
   <item><key>monitor</key><value>yes</value></item></tagSet>
 </item></instancesSet></item></reservationSet>
</DescribeInstancesResponse>"""


@pytest.fixture(scope="session")
def prometheus_version(tool_image: ToolImage) -> str:
    return tool_image.prometheus_version


@pytest.fixture
def ec2() -> Iterator[tuple[str, list[dict[str, list[str]]]]]:
    """A stand-in for EC2's API with one instance, and the calls that it got."""
    calls: list[dict[str, list[str]]] = []

    class Api(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            calls.append(urllib.parse.parse_qs(body))
            known = calls[-1]["Action"] == ["DescribeInstances"]
            self.send_response(200 if known else 403)
            self.end_headers()
            self.wfile.write(INSTANCES.encode() if known else b"")

        def log_message(self, format: str, *_: Any) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", calls
        server.shutdown()


@contextlib.contextmanager
def prometheus(folder: Path) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """A Prometheus with the configuration of that folder; yields what asks for its targets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def targets() -> list[dict[str, Any]]:
        url = f"http://{address}/api/v1/targets"
        with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
            return json.load(answer)["data"]["activeTargets"]
        return []

    log = folder / "log"
    argv = [str(tool("prometheus")), f"--config.file={folder}/etc/prometheus/prometheus.yml"]
    argv += [f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address={address}"]
    with log.open("w") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out)
    try:
        assert wait_until(targets, seconds=30), log.read_text()
        yield targets
    finally:
        process.kill()
        process.wait()


def test_discovered_targets_have_the_safe_access_and_a_stable_name(
    slave_server: Callable[..., SlaveServer],
    slave_secrets: Callable[..., ServerSecrets],
    ec2: tuple[str, list[dict[str, list[str]]]],
    tmp_path: Path,
) -> None:
    endpoint, calls = ec2
    by_tag = {"region": "eu-west-1", "filters": [{"name": "tag:monitor", "values": ["yes"]}]}
    by_file = {"files": [f"{TARGET_FILES}/others.yml"]}
    chosen = [
        JobSettings.model_validate({"name": name, "labels": {"group": "found"}, **discovery})
        for name, discovery in (
            ("fleet", {"ec2_sd_configs": [by_tag]}),
            ("others", {"file_sd_configs": [by_file]}),
        )
    ]
    server = slave_server(jobs=tuple(job.job() for job in chosen))
    for file in (
        slave.host_files(server).with_files(slave.secret_files(server, slave_secrets())).files
    ):
        path = tmp_path / file.path[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.content.replace(TARGET_FILES, str(tmp_path)))
    (tmp_path / "others.yml").write_text(
        yaml.safe_dump([{"targets": ["nas.example.internal:9100"], "labels": {"rack": "7"}}])
    )
    # Where the API is, and as whom to ask: on a server its region and instance profile say that.
    fleet = tmp_path / "etc/prometheus/jobs.d/fleet.yml"
    config = yaml.safe_load(fleet.read_text())
    config["scrape_configs"][0]["ec2_sd_configs"][0] |= {
        "endpoint": endpoint,
        "access_key": "nobody",
        "secret_key": "nothing",
    }
    fleet.write_text(yaml.safe_dump(config))

    with prometheus(tmp_path) as targets:

        def found() -> dict[str, dict[str, Any]] | None:
            active = {t["scrapePool"]: t for t in targets()}
            return active if {"fleet", "others"} <= active.keys() else None

        active = wait_until(found, seconds=30)
    assert active, calls
    assert active["fleet"]["labels"] == {
        "job": "fleet",
        "instance": "i-0abc",
        "name": "web one",
        "group": "found",
    }
    assert active["fleet"]["scrapeUrl"] == "https://10.0.0.50:9100/metrics"
    assert active["others"]["labels"] == {
        "job": "others",
        "instance": "nas.example.internal:9100",
        "rack": "7",
        "group": "found",
    }
    (asked, *_) = [call for call in calls if call["Action"] == ["DescribeInstances"]]
    assert asked["Filter.1.Name"] == ["tag:monitor"]
    assert asked["Filter.1.Value.1"] == ["yes"]

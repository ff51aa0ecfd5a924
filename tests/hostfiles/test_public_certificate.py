"""What a server gets whose nginx shows a certificate of a public authority."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from hostfiles import certificates, cloud_init, existing_master, node_exporter, slave
from hostfiles.model import (
    Acme,
    Challenge,
    ExistingMaster,
    ExistingMasterSecrets,
    FederatedSite,
    Job,
    Leaf,
    ServerSecrets,
    SlaveServer,
)
from hostfiles.templates import FOLDER
from tests.hostfiles.conftest import SLAVE, Authority, Root, ToolImage, alerting
from tests.hostfiles.test_real_tools import check


@pytest.fixture
def acme() -> Acme:
    return Acme(
        email="operator@example.com",
        server="https://acme.example.org/dir",
        port=443,
        challenge="http-01",
        roots=Authority().certificate,
        private=True,
    )


@pytest.mark.machines
@pytest.mark.parametrize("challenge", ["http-01", "dns-01"])
@pytest.mark.parametrize("name", ["systemd units", "nginx's federation.conf"])
def test_every_check_passes_before_there_is_a_certificate(
    tool_root: Root,
    tool_image: ToolImage,
    slave_server: Callable[..., SlaveServer],
    slave_secrets: Callable[..., ServerSecrets],
    acme: Acme,
    name: str,
    challenge: Challenge,
) -> None:
    acme = replace(acme, challenge=challenge)
    server = slave_server(acme=acme, alerting=alerting(tool_image.alertmanager_version))
    release = replace(server.prometheus, version=tool_image.prometheus_version)
    server = replace(server, prometheus=release)
    host = slave.host_files(server).with_files(slave.secret_files(server, slave_secrets()))
    done = check(tool_root, host, name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_of_it_is_on_a_host_of_our_own_ca(
    slave_server: Callable[..., SlaveServer], acme: Acme
) -> None:
    def about(server: SlaveServer) -> set[str]:
        host = slave.host_files(server)
        words = ("certbot", "public-certificate", "trusted.pem")
        return {
            file.path
            for file in host.files
            # It asks for the unit always, so that another mode does not restart it.
            if file.path != node_exporter.SERVICE
            and any(word in file.path or word in file.content for word in words)
        }

    assert about(slave_server()) == set()
    assert about(slave_server(acme=acme)) >= {
        "/etc/systemd/system/certbot.timer",
        "/etc/prometheus/alerts/public-certificate.yml",
    }


METADATA = "169.254.169.254"


def test_only_services_with_a_role_may_ask_the_metadata_service(
    slave_server: Callable[..., SlaveServer], acme: Acme
) -> None:
    def may(server: SlaveServer) -> set[str]:
        host = slave.host_files(server)
        files = {file.path.rpartition("system/")[2]: file.content for file in host.files}
        running = {name: text for name, text in files.items() if "\nProtectClock=" in text}
        assert {"nginx.service.d/federation.conf", "prometheus.service"} <= running.keys()
        for text in running.values():
            assert f"\nIPAddressDeny={METADATA}\n" in text
        return {name for name, text in running.items() if f"IPAddressAllow={METADATA}" in text}

    assert may(slave_server()) == set()
    assert may(slave_server(acme=acme)) == set()
    assert may(slave_server(acme=replace(acme, challenge="dns-01"))) == {"certbot.service"}
    fleet = Job(name="fleet", discovery={"ec2_sd_configs": [{}]}, discovered_ports=(9100,))
    assert may(slave_server(jobs=(fleet,))) == {"prometheus.service"}


@pytest.mark.parametrize("challenge", ["http-01", "dns-01"])
def test_user_data_has_room_for_it(
    slave_server: Callable[..., SlaveServer], acme: Acme, challenge: Challenge
) -> None:
    host = slave.host_files(slave_server(acme=replace(acme, challenge=challenge)))
    data = cloud_init.user_data(host, first_contact_key="k" * 400, first_contact_public="p")
    assert len(data) <= cloud_init.LIMIT


def test_one_metric_is_described_in_one_way() -> None:
    # node_exporter refuses a metric that two files describe differently.
    loader = importlib.machinery.SourceFileLoader("program", str(FOLDER / "public-certificate"))
    spec = importlib.util.spec_from_loader("program", loader)
    assert spec
    program = importlib.util.module_from_spec(spec)
    loader.exec_module(program)
    described = certificates.metrics({"/x": 1}).content.splitlines()[0]
    assert described == f"# HELP {program.EXPIRY} {program.EXPIRY_HELP}"


def test_an_existing_master_trusts_the_authority_beside_our_ca(
    site: FederatedSite, authority: Authority, leaves: dict[str, Leaf], acme: Acme
) -> None:
    master = ExistingMaster(
        owner="x",
        config_file="/etc/prometheus/prometheus.yml",
        run_as="prometheus",
        promtool="promtool",
        url="http://127.0.0.1:9090",
        api_ca="",
        reload="signal",
        unit="prometheus.service",
        ca_bundle=authority.certificate,
        sites=(replace(site, public_roots=acme.roots),),
    )
    secrets = ExistingMasterSecrets(leaf=leaves[SLAVE], site_passwords={"dublin": "R" * 48})
    delivered = json.loads(existing_master.delivery(master, secrets))
    trusted = authority.certificate + acme.roots
    (name,) = (name for name, text in delivered["files"].items() if text == trusted)
    assert f"ca_file: files/{name}" in delivered["sites"]["dublin"]["content"]

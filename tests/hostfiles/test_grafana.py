"""A Grafana on the master, as far as it can be tested without one: its build cannot be had here."""

from __future__ import annotations

import configparser
import dataclasses
import gzip
import json
from collections.abc import Callable

import pytest
import yaml

from hostfiles import bundle, cloud_init, grafana, master
from hostfiles.files import HostFiles
from hostfiles.model import MasterSecrets, MasterServer
from tests.hostfiles.conftest import Root, release
from tests.hostfiles.test_real_tools import check

BINARY = "/opt/releases/grafana-12.1.0/bin/grafana"


@pytest.fixture
def with_grafana(
    master_server: Callable[..., MasterServer], master_secrets: Callable[..., MasterSecrets]
) -> HostFiles:
    server = master_server(grafana=release("grafana", "12.1.0"))
    secrets = master_secrets(tokens={"grafana": f"grafana_{'G' * 48}"}, grafana_key="K" * 48)
    return master.host_files(server).with_files(master.secret_files(server, secrets))


def content(host: HostFiles, path: str) -> str:
    (found,) = (file.content for file in host.files if file.path == path)
    return found


def test_without_the_setting_nothing_of_it_is_there(whole_master: HostFiles) -> None:
    assert "rafana" not in json.dumps(
        [file.path for file in whole_master.files] + [unit.name for unit in whole_master.units]
    )
    assert "/grafana/" not in content(whole_master, "/etc/nginx/federation.conf")


def test_its_secrets_are_in_files_of_its_own_and_nowhere_else(with_grafana: HostFiles) -> None:
    for secret, path in (("G" * 48, grafana.AUTHORIZATION), ("K" * 48, grafana.SECRET_KEY)):
        (file,) = (file for file in with_grafana.files if secret in file.content)
        assert (file.path, file.secret, file.group) == (path, True, "grafana")
    header = next(file for file in with_grafana.files if file.path == grafana.AUTHORIZATION)
    assert (header.group, header.mode) == ("grafana", 0o640)
    assert header.content.startswith("Bearer grafana_")
    # It comes in at nginx by it, which knows a digest.
    assert '"/grafana" ' in content(with_grafana, "/etc/nginx/callers.map")


def test_it_asks_prometheus_through_nginx_and_verifies_it(with_grafana: HostFiles) -> None:
    path = "/etc/grafana/provisioning/datasources/federation.yml"
    (source,) = yaml.safe_load(content(with_grafana, path))["datasources"]
    assert source["url"] == "https://127.0.0.1:443"
    assert source["jsonData"]["serverName"] == "prometheus-master.example.com"


def test_who_comes_in_is_nginx_s_word_and_may_only_look(with_grafana: HostFiles) -> None:
    config = configparser.ConfigParser(interpolation=None)
    config.read_string(content(with_grafana, grafana.CONFIG))
    assert config["server"]["http_addr"] == "127.0.0.1"
    assert config["auth.proxy"]["whitelist"] == "127.0.0.1"
    assert config["users"]["auto_assign_org_role"] == "Viewer"
    assert config["security"]["disable_initial_admin_creation"] == "true"
    assert config["security"]["secret_key"] == f"$__file{{{grafana.SECRET_KEY}}}"
    for section in ("auth.anonymous", "auth.basic", "public_dashboards"):
        assert config[section]["enabled"] == "false"
    header = config["auth.proxy"]["header_name"]
    nginx = content(with_grafana, "/etc/nginx/federation.conf")
    assert nginx.count(f"proxy_set_header {header} $remote_user;") == 1
    assert nginx.count(header) == 1


def test_user_data_holds_nothing_of_it(
    master_server: Callable[..., MasterServer], ssh_key: tuple[str, str]
) -> None:
    host = master.host_files(master_server(grafana=release("grafana", "12.1.0")))
    # The program that a first boot fetches is named there.
    host = dataclasses.replace(host, releases=())
    private, public = ssh_key
    data = cloud_init.user_data(host, first_contact_key=private, first_contact_public=public)
    text = gzip.decompress(data).decode()
    assert "/etc/grafana/" not in text
    assert "grafana.service" not in text
    assert "federation-host.json" in bundle.render(host)


@pytest.mark.machines
@pytest.mark.parametrize("name", ["nginx's federation.conf", "grafana.service"])
def test_its_files_pass_the_checks(tool_root: Root, with_grafana: HostFiles, name: str) -> None:
    tool_root.write(BINARY, "#!/bin/sh\n", 0o755)
    done = check(tool_root, with_grafana, name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.machines
def test_its_unit_is_as_hardened_as_the_others(tool_root: Root, with_grafana: HostFiles) -> None:
    tool_root.write(grafana.SERVICE, content(with_grafana, grafana.SERVICE))
    tool_root.write(BINARY, "#!/bin/sh\n", 0o755)
    argv = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "grafana.service"]
    done = tool_root.run(argv)
    assert done.returncode == 0, done.stdout + done.stderr

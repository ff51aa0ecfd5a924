"""What is secret, and where it must not be."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable

import pytest
import yaml

from hostfiles import (
    alertmanager,
    backup,
    bundle,
    cloud_init,
    nginx_package,
    programs,
    slave,
    system,
    watch,
)
from hostfiles.files import File, HostFiles
from hostfiles.model import ServerSecrets, SlaveServer
from hostfiles.web_config import web_config
from tests.hostfiles.conftest import credential

# 64 KB that gzip can halve at best.
NOISE = "".join(hashlib.sha256(str(n).encode()).hexdigest() for n in range(1000))


def test_no_public_file_holds_a_secret(whole_slave: HostFiles, whole_master: HostFiles) -> None:
    for host in (whole_slave, whole_master):
        for file in host.files:
            if not file.secret:
                for canary in ("R" * 48, "L" * 48, "U" * 48, "WWWW", "PRIVATE KEY-----\n", "$2b$"):
                    assert canary not in file.content, file.path


def test_secret_files_are_for_one_group_at_most(
    whole_slave: HostFiles, whole_master: HostFiles
) -> None:
    for host in (whole_slave, whole_master):
        secret = [file for file in host.files if file.secret]
        assert secret
        for file in secret:
            assert file.owner == "root"
            assert file.mode == 0o640, file.path
            assert file.group in {"prometheus", "node_exporter", "www-data", "alertmanager"}


def test_no_command_holds_a_secret(whole_slave: HostFiles) -> None:
    argv = [word for check in whole_slave.checks for word in check.argv]
    argv += [word for unit in whole_slave.units for word in unit.ready]
    assert not [word for word in argv if "R" * 8 in word or "L" * 8 in word]


def test_a_file_does_not_show_its_content() -> None:
    assert "hidden" not in repr(File(path="/x", content="hidden", secret=True))


def test_the_same_values_give_the_same_bundle(whole_slave: HostFiles) -> None:
    assert bundle.render(whole_slave) == bundle.render(whole_slave)
    paths = [file["path"] for file in json.loads(bundle.render(whole_slave))["files"]]
    assert paths == sorted(paths)


def test_a_path_rendered_twice_is_an_error(whole_slave: HostFiles) -> None:
    with pytest.raises(ValueError, match=r"/etc/nginx/federation\.conf"):
        bundle.render(
            whole_slave, (File(path="/etc/nginx/federation.conf", content="", secret=True),)
        )


def test_user_data_fits_and_holds_every_public_file_but_what_may_be_left_out(
    slave_server: Callable[..., SlaveServer], ssh_key: tuple[str, str]
) -> None:
    host = slave.host_files(slave_server())
    data = cloud_init.user_data(host, first_contact_key=ssh_key[0], first_contact_public=ssh_key[1])
    assert len(data) <= 16_384
    config = yaml.safe_load(gzip.decompress(data))
    written = {file["path"] for file in config["write_files"]}
    left_out = {file.path for file in host.files} - written
    folders = ("/etc/prometheus/", "/etc/nginx/", "/etc/node_exporter/")
    brought = (*alertmanager.PATHS, *backup.PATHS, *nginx_package.PATHS, *system.PATHS)
    brought += (*watch.PATHS, programs.MOUNT_DATA)
    assert all(path.startswith((*folders, *brought)) for path in left_out)
    assert programs.MOUNT_DATA in left_out, "it is long, and the first bundle brings it"
    assert data == cloud_init.user_data(
        host, first_contact_key=ssh_key[0], first_contact_public=ssh_key[1]
    )


def test_user_data_leaves_out_what_grows_before_it_bursts(
    slave_server: Callable[..., SlaveServer],
    ssh_key: tuple[str, str],
) -> None:
    host = slave.host_files(slave_server(rule_files={"big.yml": NOISE}))
    data = cloud_init.user_data(host, first_contact_key=ssh_key[0], first_contact_public=ssh_key[1])
    written = {f["path"] for f in yaml.safe_load(gzip.decompress(data))["write_files"]}
    assert not [path for path in written if path.startswith("/etc/prometheus/")]
    assert "/usr/local/sbin/apply-bundle" in written


def test_user_data_that_cannot_fit_names_its_size(
    slave_server: Callable[..., SlaveServer], ssh_key: tuple[str, str]
) -> None:
    host = slave.host_files(slave_server()).with_files((File(path="/etc/x/noise", content=NOISE),))
    with pytest.raises(ValueError, match=r"\d{5} bytes, EC2 takes 16384"):
        cloud_init.user_data(host, first_contact_key=ssh_key[0], first_contact_public=ssh_key[1])


def test_user_data_refuses_a_secret_file(whole_slave: HostFiles, ssh_key: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"prometheus\.key"):
        cloud_init.user_data(
            whole_slave, first_contact_key=ssh_key[0], first_contact_public=ssh_key[1]
        )


def test_two_remote_users_overlap_while_a_password_is_rotated(
    slave_server: Callable[..., SlaveServer], slave_secrets: Callable[..., ServerSecrets]
) -> None:
    both = (credential("old", "O" * 48), credential("new", "N" * 48))
    files = {
        file.path: file.content
        for file in slave.secret_files(slave_server(), slave_secrets(remote=both))
    }
    users = yaml.safe_load(files["/etc/prometheus/web.yml"])["basic_auth_users"]
    assert list(users) == ["old", "new", "local"]
    htpasswd = files["/etc/nginx/users.htpasswd"].splitlines()
    assert [line.split(":")[0] for line in htpasswd] == ["old", "new"]


def test_two_users_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="two users 'a'"):
        web_config(
            certificate="c", key="k", ca="a", users=[credential("a", "1"), credential("a", "2")]
        )

"""User-data: what a new instance makes of itself at its first boot.

It holds the files that are not secret, and one private key, the SSH host key of the first contact,
which the bootstrap replaces (cloud-init/replace-host-key).
https://cloudinit.readthedocs.io/en/latest/reference/modules.html
"""

from __future__ import annotations

import gzip
import shlex
from typing import Any

import yaml

from hostfiles import (
    alertmanager,
    backup,
    firewall,
    grafana,
    nginx,
    nginx_package,
    node_exporter,
    oauth2_proxy,
    programs,
    prometheus,
    public_certificate,
    system,
    watch,
)
from hostfiles.files import File, HostFiles
from hostfiles.releases import install_command

# https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/user-data.html
LIMIT = 16_384
# Of no use before the first bundle.
_NEVER = (
    *grafana.PATHS,
    *system.PATHS,
    *watch.PATHS,
    *alertmanager.PATHS,
    f"{prometheus.FOLDER}/alerts/",
    programs.MOUNT_DATA,
)
# In this order.
_LEFT_OUT = (
    (*backup.PATHS, *nginx_package.PATHS, *oauth2_proxy.PATHS, *public_certificate.PATHS),
    (f"{prometheus.FOLDER}/",),
    (f"{nginx.FOLDER}/", f"{node_exporter.FOLDER}/"),
)


def user_data(host: HostFiles, *, first_contact_key: str, first_contact_public: str) -> bytes:
    """A gzipped #cloud-config of at most 16,384 bytes.

    What does not fit is left out, backups and what grows with the settings first: the first
    bundle brings it anyway, and no service starts before.
    """
    secret = [file.path for file in host.files if file.secret]
    if secret:
        raise ValueError(f"secret files must not enter user-data: {', '.join(secret)}")
    known = {file.path: file for file in (*host.files, *host.first_boot)}
    data = b""
    for count in range(len(_LEFT_OUT) + 1):
        left_out = tuple(path for paths in (_NEVER, *_LEFT_OUT[:count]) for path in paths)
        files = [file for file in known.values() if not file.path.startswith(left_out)]
        data = _compress(_config(host, files, first_contact_key, first_contact_public))
        if len(data) <= LIMIT:
            return data
    raise ValueError(
        f"user-data has {len(data)} bytes, EC2 takes {LIMIT}; operatorCidrs and packageCidrs are "
        "what grows with the settings, so name fewer networks"
    )


def _compress(config: dict[str, Any]) -> bytes:
    text = "#cloud-config\n" + yaml.safe_dump(config, sort_keys=False, width=1000)
    return gzip.compress(text.encode(), compresslevel=9, mtime=0)


def _config(
    host: HostFiles, files: list[File], first_contact_key: str, first_contact_public: str
) -> dict[str, Any]:
    return {
        # The host has the one key that we know, and none that we do not.
        "ssh_deletekeys": True,
        "ssh_keys": {
            "ed25519_private": first_contact_key,
            "ed25519_public": first_contact_public,
        },
        "ssh_pwauth": False,
        "disable_root": True,
        # A failed first boot costs a new instance: a mirror that stumbles must not fail it.
        "apt": {"conf": 'Acquire::Retries "5";'},
        "package_update": True,
        "packages": sorted(host.packages),
        "write_files": [_write_file(file) for file in files],
        "runcmd": [
            "set -eu",
            f"systemd-sysusers {programs.SYSUSERS}",
            # An image that has nginx already has started it, and its page answers on port 80.
            "systemctl stop nginx.service",
            "rm -f /etc/nginx/sites-enabled/default",
            "systemctl daemon-reload",
            f"systemctl restart {firewall.UNIT.name}",
            # If one cannot be fetched now, apply-bundle tries again and says why.
            *(f"{shlex.join(install_command(release))} || true" for release in host.releases),
        ],
    }


def _write_file(file: File) -> dict[str, Any]:
    if (file.owner, file.group) != ("root", "root"):
        raise ValueError(f"{file.path} belongs to {file.owner}:{file.group}, who is not there yet")
    return {
        "path": file.path,
        "permissions": f"{file.mode:04o}",
        # Packages come before deferred files, and ufw's would not find its own in place.
        **({"defer": True} if file.path.startswith("/etc/ufw/") else {}),
        "content": file.content,
    }

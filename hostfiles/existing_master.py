"""What an existing master gets: a federate job for each site, and what the jobs come in with.

The Prometheus is not ours. cloud-init/existing-master puts this in place, and takes it away again.
"""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import yaml

from hostfiles import prometheus
from hostfiles.duration import milliseconds
from hostfiles.model import ExistingMaster, ExistingMasterSecrets
from hostfiles.remote_program import install_command, remove_command
from hostfiles.templates import FOLDER

# existing-master refuses another number.
FORMAT = 1
NAME = "existing-master"
PROGRAM = f"/opt/federation-master/bin/{NAME}"
# What is left of it by a removal that was killed at its end.
ASIDE = "/opt/.federation-master"

INSTALL = install_command(NAME, '["program"]')


def remove(owner: str) -> str:
    """The command that leaves the host as it was."""
    return remove_command(f"python3 {PROGRAM} remove {owner}", PROGRAM, ASIDE)


def delivery(master: ExistingMaster, secrets: ExistingMasterSecrets) -> str:
    """All that existing-master needs, as the JSON that it reads on stdin.

    Files of secrets are named by what is in them: Prometheus reads a password's file when it makes
    a job's client, and certificate and key must change together.
    """
    sites = {site.site: site for site in master.sites}
    if set(sites) != set(secrets.site_passwords):
        raise ValueError(
            f"sites {sorted(sites)} have passwords for {sorted(secrets.site_passwords)}"
        )
    client = f"client-{_digest(secrets.leaf.certificate + secrets.leaf.key)}"
    files = {
        f"{client}.crt": secrets.leaf.certificate,
        f"{client}.key": secrets.leaf.key,
    }
    jobs: dict[str, dict[str, Any]] = {}
    for name, site in sorted(sites.items()):
        password = secrets.site_passwords[name]
        # In a folder of their own, flat.
        path = prometheus.password_file(name, password).removeprefix("secrets/")
        files[path] = password
        trusted = master.ca_bundle + site.public_roots
        ca = f"ca-{_digest(trusted)}.pem"
        files[ca] = trusted
        job = prometheus.federate_job(site, path)
        job["basic_auth"]["password_file"] = f"files/{path}"
        job["tls_config"] |= {
            "ca_file": f"files/{ca}",
            "cert_file": f"files/{client}.crt",
            "key_file": f"files/{client}.key",
        }
        jobs[name] = {
            "content": yaml.safe_dump({"scrape_configs": [job]}, sort_keys=False, width=1000),
            # How long its first scrape may take to begin and to end.
            "seconds": sum(
                milliseconds(job[key]) / 1000 for key in ("scrape_interval", "scrape_timeout")
            ),
        }
    return json.dumps(
        {
            "format": FORMAT,
            "owner": master.owner,
            "program": (FOLDER / NAME).read_text(),
            "server": {
                "config_file": master.config_file,
                "run_as": master.run_as,
                "promtool": master.promtool,
                "url": master.url,
                "ca": master.api_ca,
                "username": secrets.api_user,
                "password": secrets.api_password,
                "reload": master.reload,
                "unit": master.unit,
            },
            "sites": jobs,
            "files": files,
        },
        sort_keys=True,
        indent=1,
    )


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12]

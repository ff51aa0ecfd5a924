"""How a Grafana asks the master: its data source, by files, without any secret in it.

https://grafana.com/docs/grafana/latest/administration/provisioning/#data-sources
"""

from __future__ import annotations

import yaml

from hostfiles.duration import milliseconds

FOLDER = "/etc/grafana/federation"
CA = f"{FOLDER}/ca.pem"
# The whole value of the header: `Bearer …` with a token, or `Basic …` with a password.
AUTHORIZATION = f"{FOLDER}/authorization"


def data_source(*, url: str, server_name: str, scrape_interval: str) -> str:
    """A provisioning file. Grafana reads the CA and the credential from files beside it.

    https://grafana.com/docs/grafana/latest/setup-grafana/configure-grafana/#file-provider
    """
    source = {
        "name": "Federation",
        "uid": "federation",
        "type": "prometheus",
        # Grafana's server asks, not the browser.
        "access": "proxy",
        "url": url,
        "isDefault": True,
        "editable": False,
        "jsonData": {
            "httpMethod": "POST",
            "prometheusType": "Prometheus",
            # Rules are made in files; Grafana need not try to write any.
            "manageAlerts": False,
            "timeInterval": f"{milliseconds(scrape_interval) // 1000}s",
            "tlsAuthWithCACert": True,
            "serverName": server_name,
            "httpHeaderName1": "Authorization",
        },
        "secureJsonData": {
            "tlsCACert": f"$__file{{{CA}}}",
            "httpHeaderValue1": f"$__file{{{AUTHORIZATION}}}",
        },
    }
    return yaml.safe_dump({"apiVersion": 1, "datasources": [source]}, sort_keys=False)

"""When certificates end, as a metric of the host that holds them.

https://github.com/prometheus/node_exporter#textfile-collector
"""

from __future__ import annotations

from collections.abc import Mapping

from hostfiles.files import File

FOLDER = "/etc/node_exporter/textfile"
METRIC = "federation_certificate_expiry_timestamp_seconds"


def metrics(ends: Mapping[str, int]) -> File:
    """The textfile of a host whose certificates, by path, end at these Unix times."""
    return File(
        path=f"{FOLDER}/certificates.prom",
        content="".join(
            [
                f"# HELP {METRIC} When a certificate ends, in seconds since 1970.\n",
                f"# TYPE {METRIC} gauge\n",
                *(f'{METRIC}{{path="{path}"}} {end}\n' for path, end in sorted(ends.items())),
            ]
        ),
    )

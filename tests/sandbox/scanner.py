"""What sslyze finds at a listener: which TLS it speaks, and which of the known holes it has.

https://nabla-c0d3.github.io/sslyze/documentation/
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.plan import CACHE_DIR, NETNS_DIR
from tests.sandbox.probe import Door

REQUIREMENTS = Path(__file__).with_name("requirements-sslyze.txt")
VERSIONS = ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2", "tls_1_3")
COMMANDS = (
    *("--sslv2", "--sslv3", "--tlsv1", "--tlsv1_1", "--tlsv1_2", "--tlsv1_3"),
    *("--elliptic_curves", "--heartbleed", "--robot", "--openssl_ccs", "--reneg"),
    *("--compression", "--early_data", "--ems", "--fallback"),
)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The suites of each version (those without any are left out), curves, and holes by name."""

    suites: dict[str, set[str]]
    curves: set[str]
    findings: list[str]


def scan(namespace: str | None, door: Door, certificate: Path, key: Path, report: Path) -> Scan:
    """Scans a listener from a namespace (None: from here) as a client with that certificate.

    Raises RuntimeError if any part of the scan failed: what was not asked is not well.
    """
    where = ["nsenter", f"--net={NETNS_DIR / namespace}"] if namespace else []
    argv = [*where, str(_python()), "-m", "sslyze", "--quiet", f"--json_out={report}"]
    argv += ["--mozilla_config=disable", "--sni", door.name]
    argv += ["--cert", str(certificate), "--key", str(key)]
    argv += [*COMMANDS, f"{door.address}:{door.port}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"sslyze: {done.stdout}{done.stderr}")
    (server,) = json.loads(report.read_text())["server_scan_results"]
    if server["scan_status"] != "COMPLETED":
        raise RuntimeError(f"sslyze: {server['connectivity_error_trace']}")
    parts: dict[str, Any] = {}
    for name, part in server["scan_result"].items():
        if part["status"] == "ERROR":
            raise RuntimeError(f"sslyze: {name}: {part['error_reason']}: {part['error_trace']}")
        if part["status"] == "COMPLETED":
            parts[name] = part["result"]
    suites = {
        version: {
            suite["cipher_suite"]["name"]
            for suite in parts[f"{version}_cipher_suites"]["accepted_cipher_suites"]
        }
        for version in VERSIONS
    }
    return Scan(
        suites={version: found for version, found in suites.items() if found},
        curves={curve["name"] for curve in parts["elliptic_curves"]["supported_curves"] or []},
        findings=_findings(parts),
    )


def _findings(parts: dict[str, Any]) -> list[str]:
    renegotiation = parts["session_renegotiation"]
    holes = {
        "Heartbleed": parts["heartbleed"]["is_vulnerable_to_heartbleed"],
        "CCS injection": parts["openssl_ccs_injection"]["is_vulnerable_to_ccs_injection"],
        "ROBOT": not parts["robot"]["robot_result"].startswith("NOT_VULNERABLE"),
        "renegotiation by the client": renegotiation["is_vulnerable_to_client_renegotiation_dos"],
        "insecure renegotiation": not renegotiation["supports_secure_renegotiation"],
        "compression": parts["tls_compression"]["supports_compression"],
        "early data": parts["tls_1_3_early_data"]["supports_early_data"],
        "no extended master secret": not parts["tls_extended_master_secret"][
            "supports_ems_extension"
        ],
        "downgrade": not parts["tls_fallback_scsv"]["supports_fallback_scsv"],
    }
    return [name for name, there in holes.items() if there]


def _python() -> Path:
    """The Python of a virtual environment with sslyze, made where it is missing."""
    home = CACHE_DIR / f"sslyze-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([python, *install, "--requirement", REQUIREMENTS], check=True)
        (home / "complete").touch()
    return python

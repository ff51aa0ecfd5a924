"""The preview without an account: exactly what a change would do, and no secret."""

from __future__ import annotations

import copy
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sandbox import preview as preview_module
from sandbox.preview import differences
from sandbox.program import evaluate, read_project
from sandbox.recorder import Recorder
from tests.unit.conftest import NAMESPACE, ROOT, Evaluated, run_program


def preview(before: Evaluated, after: Evaluated) -> list[str]:
    return list(differences(before.recorder.resources, after.recorder.resources))


def titles(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith(" ")]


def test_the_same_settings_would_change_nothing(dev: Evaluated) -> None:
    assert preview(dev, run_program()) == []


def test_a_target_changes_one_property_of_one_resource_and_one_line_of_one_file(
    dev: Evaluated,
) -> None:
    slaves = copy.deepcopy(dev.project.config[f"{NAMESPACE}:slaves"])
    slaves[0]["jobs"][0]["targets"] = ["10.0.0.11:9100"]
    lines = preview(dev, run_program(slaves=slaves))
    assert titles(lines) == ["~ change  command:remote:Command slave-dublin-bundle"]
    assert "    ~ stdin: [secret], of which:" in lines
    assert [line.strip() for line in lines if "jobs.d" in line] == [
        "~ /etc/prometheus/jobs.d/CoreSystems.yml"
    ]
    assert [line.split() for line in lines if "10.0.0.11" in line] == [
        ["+", "-", "10.0.0.11:9100"],
    ]


def test_a_firewall_source_changes_its_rules_and_the_hosts_ufw(dev: Evaluated) -> None:
    lines = preview(dev, run_program(operatorCidrs=["203.0.113.8/32"]))
    rule = "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule"
    names = ("master-in-tcp-22", "master-in-tcp-443", "slave-dublin-in-tcp-22")
    assert set(titles(lines)) == {
        *(f"- delete  {rule} {name}-203-0-113-7-32" for name in names),
        *(f"+ create  {rule} {name}-203-0-113-8-32" for name in names),
        "~ change  command:remote:Command master-bundle",
        "~ change  command:remote:Command slave-dublin-bundle",
    }
    files = {line.strip() for line in lines if line.strip().startswith("~ /")}
    assert files == {"~ /etc/ufw/user.rules"}


def test_an_instance_type_changes_the_instance_and_the_limits_that_follow_from_it(
    dev: Evaluated,
) -> None:
    changed = run_program(master={"host": "prometheus-master", "instanceType": "t3.small"})
    lines = preview(dev, changed)
    assert titles(lines) == [
        "~ change  aws:ec2/instance:Instance master-1",
        "~ change  command:remote:Command master-bundle",
    ]
    assert "    ~ instanceType: t3.micro -> t3.small" in lines
    files = {line.strip() for line in lines if line.strip().startswith("~ /")}
    assert files == {"~ /etc/systemd/system/prometheus.service"}


def test_a_replacement_says_so_and_names_the_reason(dev: Evaluated) -> None:
    changed = run_program(master={"host": "prometheus-master", "subnetId": "subnet-z"})
    lines = preview(dev, changed)
    assert "± replace aws:ec2/instance:Instance master-1" in titles(lines)
    assert "    ~ subnetId: subnet-a -> subnet-z (replaces)" in lines


def test_a_changed_password_is_told_and_not_shown(dev: Evaluated) -> None:
    slaves = copy.deepcopy(dev.project.config[f"{NAMESPACE}:slaves"])
    slaves[0]["password"] = "canary-canary-canary-canary"
    lines = preview(dev, run_program(slaves=slaves))
    assert "        ~ /etc/prometheus/web.yml [secret]" in lines
    assert "canary" not in "\n".join(lines)
    assert "$2b$" not in "\n".join(lines)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone of the working tree as it is, committed."""
    clone = tmp_path / "clone"
    shutil.copytree(
        ROOT, clone, ignore=shutil.ignore_patterns(".venv", ".git", ".sandbox*", "__pycache__")
    )
    git(clone, "init", "-q", "-b", "main")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "as it is")
    return clone


def git(folder: Path, *words: str) -> None:
    identity = {
        f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    subprocess.run(["git", "-C", str(folder), *words], check=True, env={**os.environ, **identity})


def make_preview(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandbox.preview", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_commit_is_compared_with_the_working_tree(checkout: Path) -> None:
    same = make_preview(checkout, "--ref", "main", "--stack", "dev")
    assert same.returncode == 0, same.stderr
    assert "no changes" in same.stdout
    file = checkout / "Pulumi.dev.yaml"
    config = yaml.safe_load(file.read_text())
    config["config"][f"{NAMESPACE}:slaves"][0]["jobs"][0]["targets"] = ["core05.internal:9100"]
    config["config"][f"{NAMESPACE}:operatorCidrs"] = ["203.0.113.8/32"]
    config["config"][f"{NAMESPACE}:slaves"][0]["instanceType"] = "t3.small"
    file.write_text(yaml.safe_dump(config))
    told = make_preview(checkout, "--ref", "main", "--stack", "dev")
    assert told.returncode == 0, told.stderr
    properties = {
        line.strip().split(":")[0] for line in told.stdout.splitlines() if line[:6] == "    ~ "
    }
    assert properties == {"~ stdin", "~ instanceType"}
    assert "core05.internal:9100" in told.stdout


@pytest.mark.parametrize("module", ["settings.py", "job_settings.py", "hostfiles/duration.py"])
def test_another_folder_is_evaluated_with_its_own_modules(checkout: Path, module: str) -> None:
    ours = {name: importlib.import_module(name) for name in ("settings", "hostfiles.duration")}
    (checkout / module).write_text('raise ValueError("this very module")\n')
    with pytest.raises(ValueError, match="this very module"):
        evaluate(read_project(checkout, "dev"), Recorder())
    assert {name: sys.modules[name] for name in ours} == ours
    files = {str(getattr(known, "__file__", None)) for known in list(sys.modules.values())}
    assert not {file for file in files if file.startswith(str(checkout))}


def test_a_commit_is_checked_out_by_a_python_whose_tarfile_has_no_filters(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extractall(self: object, path: str = ".", members: object = None) -> None:
        raise NotImplementedError

    monkeypatch.setattr("tarfile.TarFile.extractall", extractall)
    monkeypatch.setattr(preview_module, "HERE", checkout)
    folder = tmp_path / "commit"
    folder.mkdir()
    preview_module._check_out("main", folder)
    assert (folder / "tests/run").read_bytes() == (ROOT / "tests/run").read_bytes()
    assert os.access(folder / "tests/run", os.X_OK)


def test_a_commit_that_is_not_there_is_told_with_the_remedy(checkout: Path) -> None:
    told = make_preview(checkout, "--ref", "nowhere")
    assert told.returncode == 1
    assert "REF=nowhere" in told.stderr
    assert "fetch" in told.stderr


def test_a_broken_setting_is_told_by_the_preview_too(checkout: Path) -> None:
    file = checkout / "Pulumi.dev.yaml"
    file.write_text(file.read_text().replace("zone: example.com", "zone: nonsense"))
    told = make_preview(checkout, "--ref", "main")
    assert told.returncode == 1
    assert f"{NAMESPACE}:zone: 'nonsense'" in told.stderr
    assert "Traceback" not in told.stderr


def test_encrypted_settings_need_no_key(checkout: Path) -> None:
    file = checkout / "Pulumi.dev.yaml"
    config = yaml.safe_load(file.read_text())
    config["config"][f"{NAMESPACE}:slaves"][0]["password"] = {"secure": "v1:abc:def"}
    file.write_text(yaml.safe_dump(config))
    told = make_preview(checkout, "--ref", "main")
    assert told.returncode == 0, told.stderr
    assert "web.yml [secret]" in told.stdout


def test_sites_of_other_stacks_have_stand_ins(checkout: Path) -> None:
    file = checkout / "Pulumi.dev.yaml"
    config = yaml.safe_load(file.read_text())
    config["config"][f"{NAMESPACE}:master"]["otherStacks"] = [{"stack": "west", "sites": ["cork"]}]
    file.write_text(yaml.safe_dump(config))
    told = make_preview(checkout, "--ref", "main")
    assert told.returncode == 0, told.stderr
    assert "+ /etc/prometheus/federate.d/cork.yml" in told.stdout
    assert "+ /etc/prometheus/tls/federate/cork.key [secret]" in told.stdout
    # The rule, and the master's bundle: what its user-data would say now changes nothing.
    rule = "aws:vpc/securityGroupEgressRule:SecurityGroupEgressRule master-out-federate-cork"
    assert titles(told.stdout.splitlines()[1:]) == [
        "~ change  command:remote:Command master-bundle",
        f"+ create  {rule}",
    ]

"""The collection as an operator installs it: built, installed and found without a network."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

CLONE = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tarball(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tarball")
    subprocess.run(
        ["ansible-galaxy", "collection", "build", "--output-path", str(out)], cwd=CLONE, check=True, capture_output=True
    )
    (path,) = out.glob("cpullm-epyc-*.tar.gz")
    return path


@pytest.fixture(scope="module")
def installed(tarball, tmp_path_factory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("collections")
    (home / "none.cfg").touch()
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(home), "ANSIBLE_CONFIG": str(home / "none.cfg")}
    subprocess.run(
        ["ansible-galaxy", "collection", "install", "--offline", "-p", str(home), str(tarball)],
        cwd=home,
        env=environment,
        check=True,
        capture_output=True,
    )
    return environment


def test_the_tarball_holds_what_an_operator_needs_and_nothing_else(tarball):
    with tarfile.open(tarball) as archive:
        names = archive.getnames()
    tops = {name.split("/", 1)[0] for name in names}
    assert tops <= {
        "CHANGELOG.rst",
        "CONTRIBUTING.md",
        "FILES.json",
        "LICENSE",
        "MANIFEST.json",
        "Makefile",
        "README.md",
        "ansible.cfg",
        "changelogs",
        "docs",
        "meta",
        "patches",
        "playbooks",
        "plugins",
        "pyproject.toml",
        "roles",
        "site.yml",
    }
    assert any(name.startswith("patches/") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".gguf")]


def test_the_site_playbook_is_found_in_the_installed_collection(installed, tmp_path):
    done = subprocess.run(
        ["ansible-playbook", "cpullm.epyc.site", "--syntax-check", "-i", "host,"],
        cwd=tmp_path,
        env=installed,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_installed_collection_lists_its_models(installed, tmp_path):
    done = subprocess.run(
        ["ansible-playbook", "cpullm.epyc.models", "-e", "models_like=deepseek-r1-q8_0"],
        cwd=tmp_path,
        env=installed,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unsloth/DeepSeek-R1-GGUF DeepSeek-R1-Q8_0/*.gguf" in done.stdout


@pytest.mark.parametrize("kind", ["module", "filter", "callback"])
def test_every_plugin_has_documentation(kind, installed, tmp_path):
    done = subprocess.run(
        ["ansible-doc", "-t", kind, "-l", "cpullm.epyc", "--json"],
        cwd=tmp_path,
        env=installed,
        check=True,
        capture_output=True,
        text=True,
    )
    listed = yaml.safe_load(done.stdout)
    assert listed
    for name, summary in listed.items():
        assert summary not in ("", "UNDOCUMENTED"), name

# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller side of cpullm.epyc.llamacpp_source: get one pinned source into the cache."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.module_utils.urls import open_url
from ansible.plugins.action import ActionBase
from ansible_collections.cpullm.epyc.plugins.module_utils._build import Source
from ansible_collections.cpullm.epyc.plugins.module_utils._engine import sha256_file, write_atomically
from ansible_collections.cpullm.epyc.plugins.plugin_utils._llamacpp import (
    RECIPE_ARGUMENTS,
    cache_directory,
    have_source,
    mismatch,
    read_inputs,
    source_digest,
    source_path,
)

ARGUMENT_SPEC = {
    **RECIPE_ARGUMENTS,
    "isa": {"type": "str", "required": True},
    "release": {"type": "str", "required": True},
}
_FETCH_TIMEOUT_S = 900


class ActionModule(ActionBase):  # type: ignore[misc]
    """Returns the archive's path and hash, and the recipe for the build host."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the task's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _dummy, args = self.validate_argument_spec(argument_spec=ARGUMENT_SPEC)
        host = str((task_vars or {}).get("inventory_hostname", "localhost"))
        cache = cache_directory()
        try:
            inputs = read_inputs(args)
            path = source_path(cache, inputs.source)
            present = have_source(cache, inputs.source)
            result.update(changed=not present, path=str(path))
            if self._task.check_mode:
                if not present:
                    result["msg"] = f"would fetch {inputs.source.location} {inputs.source.version} to {path}"
                return result
            if not present:
                path.parent.mkdir(parents=True, exist_ok=True)
                with _locked(path.parent):
                    if not have_source(cache, inputs.source):
                        fetch(inputs.source, path)
        except (ValueError, OSError, subprocess.SubprocessError) as error:
            raise AnsibleActionFail(f"{host}: {error}") from error
        data = inputs.recipe(args["isa"], args["release"])
        data["archive_sha256"] = result["sha256"] = source_digest(cache, inputs.source)
        result["recipe"] = json.dumps(data, sort_keys=True)
        return result


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let one process at a time fetch into a directory."""
    with (directory / ".lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def fetch(source: Source, path: Path) -> None:
    """Get a source from where it lies, check it, and only then give it its name in the cache."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as directory:
        if source.type == "git":
            archive = _fetch_git(source, Path(directory))
            digest = sha256_file(str(archive))
            write_atomically(f"{path}.sha256", f"{digest}  {path.name}\n".encode())
        else:
            if source.type == "sdist":
                archive = _fetch_sdist(source, Path(directory), path)
            else:
                archive = _fetch_url(source, Path(directory))
            found = sha256_file(str(archive))
            if found != source.digest:
                raise ValueError(mismatch(source.location, found, source.digest))
        archive.chmod(0o644)
        archive.replace(path)


def _fetch_url(source: Source, directory: Path) -> Path:
    """Return the archive of a URL."""
    archive = directory / "archive"
    try:
        with open_url(source.location, timeout=60, follow_redirects="all") as answer, archive.open("wb") as stream:
            shutil.copyfileobj(answer, stream, 1 << 20)
    except OSError as error:
        raise ValueError(f"llamacpp_build_source.url {source.location}: {error}") from error
    return archive


def _fetch_sdist(source: Source, directory: Path, place: Path) -> Path:
    """Return the source distribution that pip downloads.

    pip and not the index's API, because pip knows the operator's index, mirrors, proxy and
    certificates. To learn the name in its metadata pip runs the package's own build backend; with
    the hash among the requirements it checks the file before that.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{source.location}=={source.version} --hash=sha256:{source.digest}\n", encoding="utf-8")
    wanted = directory / "wanted"
    argv = [*_pip(), "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    argv += ["--no-binary", source.location, "--require-hashes", "--dest", str(wanted), "--requirement"]
    done = subprocess.run(
        [*argv, str(requirements)], capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False
    )
    files = list(wanted.glob("*.tar.gz")) if wanted.is_dir() else []
    if done.returncode or len(files) != 1:
        if found := re.search(r"Got +([0-9a-f]{64})", done.stderr):
            raise ValueError(mismatch(f"{source.location} {source.version}", found[1], source.digest))
        raise ValueError(
            f"llamacpp_build_source: pip could not download {source.location} {source.version}"
            f" with sha256 {source.digest}: {done.stderr.strip()[-1500:]}"
            f"\nWithout an index, put the file at {place}, or use a source of type archive."
        )
    return files[0]


def _pip() -> list[str]:
    """Return the command of a pip: the one beside this Ansible, or the one on the path."""
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
    if probe.returncode == 0:
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip3") or shutil.which("pip")
    if found is None:
        raise ValueError(
            "llamacpp_build_source: found no pip on the controller; expected one to download the source"
            " distribution. Run: sudo apt install python3-pip, or use another type of source."
        )
    return [found]


def _fetch_git(source: Source, directory: Path) -> Path:
    """Return an archive of one commit. git itself checks every object against its name, up to the commit."""
    repository = directory / "repository"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment.update(GIT_TERMINAL_PROMPT="0", LC_ALL="C.UTF-8")

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(repository), "-c", "transfer.fsckObjects=true", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_FETCH_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise ValueError(
                f"llamacpp_build_source: git {arguments[0]} of {source.location} failed; expected the commit"
                f" {source.digest} there: {done.stderr.strip()[-1500:]}"
            )
        return done.stdout

    repository.mkdir()
    git("init", "--quiet", "--bare")
    try:
        git("fetch", "--quiet", "--depth=1", source.location, source.digest)
    except ValueError:
        # Servers may refuse commits that no branch or tag names.
        git("fetch", "--quiet", source.location, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
    # A full name is only ever found as itself: what is not there fails here.
    git("rev-parse", "--verify", f"{source.digest}^{{commit}}")
    archive = directory / "archive.tar.gz"
    git("archive", "--format=tar.gz", "--prefix=llama.cpp/", f"--output={archive}", source.digest)
    return archive

# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller side of cpullm.epyc.llamacpp_build_schedule: who builds what, for the whole play."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.cpullm.epyc.plugins.module_utils._build import owners, parse_os_release, parse_source, refusal
from ansible_collections.cpullm.epyc.plugins.module_utils._engine import missing_build_packages
from ansible_collections.cpullm.epyc.plugins.plugin_utils._llamacpp import cache_directory, cached_artifact, have_source

ARGUMENT_SPEC = {
    "plans": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "host": {"type": "str", "required": True},
            "id": {"type": "str", "required": True},
            "installed": {"type": "bool", "required": True},
            "release": {"type": "str", "required": True},
            "source": {"type": "dict", "required": True},
        },
    },
    "build_host": {"type": "str"},
    "ccache": {"type": "bool", "default": False},
}


class ActionModule(ActionBase):  # type: ignore[misc]
    """Groups the hosts by build id; says for each who builds, or why it cannot be built."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the task's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _dummy, args = self.validate_argument_spec(argument_spec=ARGUMENT_SPEC)
        cache = cache_directory()
        plans = {plan["host"]: plan for plan in args["plans"]}
        builds = owners(args["plans"])
        for build in builds:
            path, digest = cached_artifact(cache, build["id"])
            needed = bool(build["lacking"]) and digest is None
            build.update(
                builder=args["build_host"] or build["owner"],
                artifact=str(path),
                sha256=digest,
                needed=needed,
                reason=None,
            )
            if needed:
                plan = plans[build["owner"]]
                try:
                    have_source(cache, parse_source(plan["source"]))
                    check_build_host(args["build_host"], (task_vars or {}).get("groups", {}).get("all", []))
                    if args["build_host"] == "localhost":
                        check_controller(plan["release"], args["ccache"])
                except ValueError as error:
                    build["reason"] = str(error)
        result.update(changed=False, cache=str(cache), builds=builds)
        return result


def check_build_host(build_host: str | None, known: Sequence[str]) -> None:
    """Raise ValueError for a build host that the inventory does not know."""
    if build_host is not None and build_host != "localhost" and build_host not in known:
        raise ValueError(
            refusal(
                "llamacpp_build_host", repr(build_host), "null, localhost or a host of the inventory", "Correct it."
            )
        )


def check_controller(release: str, ccache: bool) -> None:
    """Raise ValueError where this controller cannot build for a release."""
    found = parse_os_release(Path("/etc/os-release").read_text(encoding="utf-8"))
    if found != release:
        raise ValueError(
            refusal(
                "llamacpp_build_host localhost",
                f"a controller with {found}",
                f"{release}, the release of the hosts that get the build (its C library must not be newer than theirs)",
                "Set llamacpp_build_host to null, or to a host of that release.",
            )
        )
    missing = missing_build_packages(ccache)
    if missing and os.geteuid() != 0:
        raise ValueError(
            refusal(
                "llamacpp_build_host localhost",
                f"a controller without {', '.join(missing)}, and no root to install them",
                "the build tools",
                f"Run: sudo apt install {' '.join(missing)}",
            )
        )

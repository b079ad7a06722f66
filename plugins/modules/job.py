#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: job
short_description: Run long work on the target in the background and show its progress
version_added: "1.0.0"
description:
  - Starts a program on the target in a session of its own, polls it over the ordinary connection, and shows percent,
    rate and time left while it runs, at least every 10 seconds.
  - When the play is killed the work goes on. The same task run again finds it and follows it, instead of starting it a
    second time.
  - Without O(argv) it waits for work that something else does, such as a service that loads its model.
  - A status is one JSON object, replaced in one step by its writer, with the keys C(phase), C(done), C(total) (null
    where unknown), C(unit) (C(steps), C(bytes), C(pages), C(s)), C(message) and C(updated) (seconds since the epoch).
    The phase C(failed) ends a wait as failed.
options:
  argv:
    description: The program and its arguments. No shell is involved.
    type: list
    elements: str
  chdir:
    description: The folder to start in.
    type: str
  environment:
    description:
      - Variables to add to the environment of O(argv) and O(status_argv).
      - They go through standard input, not a command line. The keyword C(environment) of a task has no effect here.
    type: dict
    default: {}
  key:
    description:
      - Names the job on the target. Two tasks with one key and the same O(argv) and O(chdir) share a job.
      - With one key and other arguments, the second task fails while the first job runs.
      - By default made from O(argv) and O(chdir).
    type: str
  status_file:
    description: A file on the target that holds the status. It is removed before a new job starts.
    type: path
  status_argv:
    description: A command on the target that prints the status as its last line.
    type: list
    elements: str
  poll_s:
    description: Seconds between two looks. The end of a job is seen at once.
    type: float
    default: 2
  timeout_s:
    description: Seconds after which the process group is ended and the task fails, counted from the job's start.
    type: float
    default: 3600
  stall_timeout_s:
    description: Seconds without a change of status or output after which the same happens. Unset means never.
    type: float
  title:
    description: What the progress line calls the work. By default the program.
    type: str
  done_when_complete:
    description:
      - States that the end is C(done >= total) in the status. Without O(argv) that is so anyway; with O(argv) the end
        of the program is what counts, and the two exclude each other.
    type: bool
    default: false
attributes:
  check_mode:
    description: Reports a change where O(argv) is given, and starts nothing.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: build | Compile the engine
  cpullm.epyc.job:
    argv: [python3, /opt/example/build.py, --status, /run/cpullm/build.json]
    status_file: /run/cpullm/build.json
    title: llama.cpp avx512
    timeout_s: 7200
    stall_timeout_s: 900

- name: verify | Wait until the model is loaded
  cpullm.epyc.job:
    status_argv: [/usr/local/libexec/example-load-status, "0"]
    timeout_s: 1800
    title: model load
"""

RETURN = r"""
rc:
  description: Exit status of the program, negative for a signal.
  returned: when O(argv) is given
  type: int
  sample: 0
stdout:
  description: The last 16 KiB of its standard output.
  returned: when O(argv) is given
  type: str
  sample: done
stderr:
  description: The last 16 KiB of its standard error.
  returned: when O(argv) is given
  type: str
  sample: ""
attached:
  description: Whether a job that ran already was followed.
  returned: when O(argv) is given
  type: bool
  sample: false
status:
  description: The last status seen.
  returned: always
  type: dict
  sample: {"phase": "build", "done": 220, "total": 220, "message": ""}
elapsed_s:
  description: Seconds that the work took.
  returned: always
  type: float
  sample: 512.3
"""

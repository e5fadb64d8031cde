"""Loaded by every Python process that has this folder on PYTHONPATH: SYNTHLIT_FAULT=SUFFIX[:N] kills the process between write and rename.

The N-th (default first) os.replace whose target ends with SUFFIX never happens: the file is written, its name is not, the process is gone."""

import os
import signal

suffix, _, count = os.environ.get("SYNTHLIT_FAULT", "").partition(":")
replace, calls = os.replace, []


def replace_or_die(src, dst, **kw):
    """os.replace, or SIGKILL when its turn has come."""
    if os.fspath(dst).endswith(suffix):
        calls.append(dst)
        if len(calls) == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)
    return replace(src, dst, **kw)


if suffix:
    os.replace = replace_or_die

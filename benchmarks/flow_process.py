"""How is a flow run in a process of its own, so that what another run left in memory has no say?"""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

# Nothing phones home, and the server that a flow starts for itself has time to start.
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
}


def result_of(script: str, config: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns what a script prints as JSON behind "RESULT ", numbers rounded to two decimals.

    Args:
        script: Python source; its first argument is the config as JSON.
        config: settings of a `PtqConfig`.
        environment: variables of the process.

    Raises:
        RuntimeError: the script printed no result.
    """
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(config)], env=dict(environment), capture_output=True, text=True,
        timeout=3600,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"the run ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in found.items()}

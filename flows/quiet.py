"""Telemetry of everything we use is off, and its chatter too, for us and for every child process."""

import os

QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal shows the round and its errors itself
}


def silence() -> None:
    """Call before importing any of it. What the user has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)

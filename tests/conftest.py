"""Every test runs offline, silent and on one thread: telemetry off, no hub, no spinning threads."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

os.environ.update(
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    VLLM_NO_USAGE_STATS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_WAIT_POLICY="PASSIVE",
)


@pytest.fixture(scope="session")
def fake_loop() -> ModuleType:
    """tests/fake_loop.py: `fake_loop.write_loop(folder)` writes a whole plausible loop without a model."""
    spec = importlib.util.spec_from_file_location("fake_loop", Path(__file__).with_name("fake_loop.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module

"""The StrategyTables of a bundle on disk: one for answering, one for finding training data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from search.table import Objective, StrategyTable

FILES: dict[Objective, str] = {"answer": "table.json", "rows": "rows.json"}


def load_tables(folder: Path) -> Mapping[Objective, StrategyTable]:
    """Both tables of a table stage's folder. Raises DataError."""
    return {objective: StrategyTable.load(folder / name) for objective, name in FILES.items()}

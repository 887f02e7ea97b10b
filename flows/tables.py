"""The StrategyTables of a bundle: what they are fitted on, and how they lie on disk: one for answering, one for finding
training data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from configs.schema import Config
from search.errors import BudgetError, ConfigError
from search.strategies import Spec, parse
from search.table import Objective, StrategyTable
from search.types import Budget, Task, VerifierFacts
from search.verifiers import describe

FILES: dict[Objective, str] = {"answer": "table.json", "rows": "rows.json"}


def load_tables(folder: Path) -> Mapping[Objective, StrategyTable]:
    """Both tables of a table stage's folder. Raises DataError."""
    return {objective: StrategyTable.load(folder / name) for objective, name in FILES.items()}


def fitted_with(table: StrategyTable, config: Config, task: Task, inputs: Mapping[str, Path]) -> bool:
    """Whether the verifier of a stage's inputs is the one that the table was fitted with. Raises ModelError."""
    facts = describe(config, task, trained=inputs.get("verifier"))  # as the table noted it: see `flows.tabling`
    return table.made_of.get("verifier") == (facts.fingerprint if facts else None)


def measurable(config: Config, facts: VerifierFacts | None) -> list[tuple[Spec, Budget]]:
    """Every strategy at every budget that can buy it, with the verifier that there is; greedy once.

    Raises ConfigError where a strategy's name or options are wrong, or nothing is left.
    """
    found: list[tuple[Spec, Budget]] = []
    for text in config.table.strategies:
        spec = parse(text)
        for amount in (1,) if spec.name == "greedy" else config.table.budgets:
            if (spec.needs and facts is None) or (spec.needs == "process" and facts and not facts.process):
                continue
            try:
                spec.plan(Budget("samples", amount), facts)
            except BudgetError:
                continue
            found.append((spec, Budget("samples", amount)))
    if not any(spec.name != "pass" for spec, _ in found):
        raise ConfigError("table.strategies holds nothing that can be run here: add majority, or give a verifier")
    return found

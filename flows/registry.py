"""The loop's models in MLflow's registry: a version for each model a round made, aliases for those in use.

A version points to its round's `model/model.json` (path, sha256, base model, adapter or not): weights stay where they
are. Aliases: `champion` and `previous` as loop.json has them, `challenger` for the newest model that is neither.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from flows.record import LoopRecord, ModelRecord

ALIASES = ("champion", "previous", "challenger")


def register(client: MlflowClient, record: LoopRecord, round_runs: Mapping[str, str]) -> int:
    """Bring versions, their tags and the aliases up to date; the number of versions made. Raises MlflowException."""
    if not record.models:
        return 0
    name = _registered_model(client, record)
    versions = _versions(client, name)
    num_made = 0
    for model in record.models:
        run_id = round_runs[f"round-{model.round:03d}"]
        wanted = {"verdict": model.verdict, "sha256": str(model.card["sha256"]), "path": str(model.card["path"])[:500]}
        have = versions.get(model.round)
        if have is None or have.tags.get("sha256") != wanted["sha256"] or have.run_id != run_id:
            versions[model.round] = have = _create(client, name, model, run_id, wanted)
            num_made += 1
        for tag, value in wanted.items():
            if have.tags.get(tag) != value:
                client.set_model_version_tag(name, have.version, tag, value)
    _move_aliases(client, name, {alias: versions[number].version for alias, number in record.aliases.items()})
    return num_made


def _registered_model(client: MlflowClient, record: LoopRecord) -> str:
    """The loop's registered model, made if needed. Another loop of the same name keeps its own."""
    for name in (record.name, f"{record.name}-{record.id[:6]}"):
        try:
            found = client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            found = client.create_registered_model(
                name, {"ratchet.loop_id": record.id}, f"Policies of loop {record.name}; model.json says where they lie."
            )
        if found.tags.get("ratchet.loop_id") == record.id:
            return name
    raise MlflowException(f"registered model '{record.name}' belongs to another loop")


def _versions(client: MlflowClient, name: str) -> dict[int, ModelVersion]:
    """Round -> its newest version."""
    found: dict[int, ModelVersion] = {}
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        for version in page:
            number = int(version.tags.get("ratchet.round", -1))
            if number not in found or int(version.version) > int(found[number].version):
                found[number] = version
        token = page.token
        if not token:
            return found


def _create(client: MlflowClient, name: str, model: ModelRecord, run_id: str, tags: Mapping[str, str]) -> ModelVersion:
    return client.create_model_version(
        name,
        source=f"runs:/{run_id}/model",
        run_id=run_id,
        tags={**tags, "ratchet.round": str(model.round)},
        description=f"Round {model.round}: {model.verdict}.",
        await_creation_for=0,
    )


def _move_aliases(client: MlflowClient, name: str, wanted: Mapping[str, str]) -> None:
    current = {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    for alias in ALIASES:
        if alias in wanted and current.get(alias) != str(wanted[alias]):
            client.set_registered_model_alias(name, alias, wanted[alias])
        elif alias not in wanted and alias in current:
            client.delete_registered_model_alias(name, alias)

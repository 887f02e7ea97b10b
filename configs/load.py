"""Read a configuration: TOML file, then `--set a.b=value` overrides, then the schema. Errors name key and way out."""

from __future__ import annotations

import difflib
import json
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from configs.schema import Config

SHIPPED = Path(__file__).parent


class InvalidConfig(ValueError):
    """The configuration cannot be used; the message says which key, why, and what would be valid."""


def load(name: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration of `name`: a path, or the name of a shipped one ("countdown", "countdown.toml").

    Raises InvalidConfig.
    """
    path = find(name)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read: {error.strerror}") from error
    for override in sorted(overrides, key=lambda override: not _names_type(override)):  # a type first, then its keys
        _apply(data, override)
    return parse(data, str(path))


def find(name: str | Path) -> Path:
    """Where the configuration lies. A path as given, else a shipped file. Raises InvalidConfig."""
    given = Path(name)
    if given.is_file():
        return given
    # Not with_suffix: "gsm8k_qwen2.5_0.5b" has dots of its own.
    shipped = SHIPPED / (given.name.removesuffix(".toml") + ".toml")
    plain_name = given.parent == Path() or given.parent.name == "configs"
    if plain_name and shipped.is_file():
        return shipped
    names = sorted(p.stem for p in SHIPPED.glob("*.toml"))
    raise InvalidConfig(f"no configuration '{name}': give a .toml file or one of {', '.join(names)}")


def parse(data: Mapping[str, Any], source: str = "the configuration") -> Config:
    """Check data against the schema. Raises InvalidConfig naming every bad key."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [_explain(problem, data) for problem in error.errors()]
        raise InvalidConfig(f"{source}: " + "; ".join(lines)) from None


def dump(config: Config) -> str:
    """The resolved configuration as JSON, stable byte for byte."""
    return json.dumps(config.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def difference(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose value differs: {"search.samples": (16, 32)}."""
    a, b = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(typing.cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _apply(data: dict[str, Any], override: str) -> None:
    """Put "a.b=value" into data. The value is TOML (16, 0.5, true, [1, 2]); what is not TOML is a string.

    Another type ("engine.type=vllm") begins its section anew: the keys of the old type mean nothing to it.
    """
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise InvalidConfig(f"--set {override}: expected section.key=value, for example --set search.samples=32")
    try:
        value: Any = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    section: dict[str, Any] = data
    for key in keys[:-1]:
        inner: Any = section.setdefault(key, {})
        if not isinstance(inner, dict):
            raise InvalidConfig(f"--set {override}: '{key}' is a value, not a section")
        section = typing.cast("dict[str, Any]", inner)
    if _names_type(override) and section.get("type", value) != value:
        section.clear()
    section[keys[-1]] = value


def _names_type(override: str) -> bool:
    return override.partition("=")[0].strip().endswith(".type")


def _explain(problem: Any, data: Mapping[str, Any]) -> str:
    """One pydantic error as one line a user can act on."""
    location = [str(part) for part in problem["loc"]]
    model = _model_at(location[:-1], data)
    path = ".".join(part for part in location if part not in _TAGS)
    if problem["type"] == "extra_forbidden" and model is not None:
        key, valid = location[-1], sorted(model.model_fields)
        near = difflib.get_close_matches(key, valid, n=1, cutoff=0.8) or _elsewhere(key)
        near = near or difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
        hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
        return f"unknown key '{path}' ({hint})"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not location or problem["type"] == "missing":
        return f"'{path}' is missing" if location else message
    shown = problem["input"]
    if isinstance(shown, (dict, BaseModel)):
        return f"[{path}] {message}"
    return f"'{path}' = {shown!r}: {message[0].lower() + message[1:]}"


_TAGS = {
    "countdown",
    "arithmetic",
    "gsm8k",
    "math",
    "jsonl",
    "scripted",
    "transformers",
    "vllm",
    "server",
    "none",
    "oracle",
    "trained",
    "pretrained",
    "judge",
    "certainty",
}


def _model_at(location: list[str], data: Mapping[str, Any]) -> type[BaseModel] | None:
    """The schema class at a location; a union is entered through its tag, which pydantic puts in the location."""
    model: Any = Config
    for part in location:
        if part in _TAGS:
            model = next((m for m in _union(model) if part in _tag_of(m)), None)
        elif isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = _given(model.model_fields[part].annotation)
        else:
            return None
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _given(annotation: Any) -> Any:
    """What an optional section is where it is given."""
    parts = [part for part in _union(annotation) if part is not type(None)]
    return parts[0] if len(parts) == 1 and len(_union(annotation)) == 2 else annotation


def _union(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation)


def _tag_of(model: Any) -> tuple[Any, ...]:
    return typing.get_args(model.model_fields["type"].annotation)


def _elsewhere(key: str) -> list[str]:
    """The dotted name of a key with this or a similar name in any section."""
    everywhere = {
        f"{section}.{name}": name
        for section, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for name in field.annotation.model_fields
    }
    near = difflib.get_close_matches(key, list(everywhere.values()), n=1, cutoff=0.8)
    return [dotted for dotted, name in everywhere.items() if near and name == near[0]][:1]

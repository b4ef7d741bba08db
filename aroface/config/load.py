"""Strict YAML: no duplicate keys, numbers that are numbers, unknown keys refused with the nearest known one."""

import re
from collections.abc import Hashable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from aroface.errors import ConfigError

__all__ = ["apply_overrides", "dump_config", "load_config", "parse_config", "read_yaml"]

Model = TypeVar("Model", bound=BaseModel)


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans, and no key twice.

    PyYAML follows YAML 1.1, where `1e-4` is a string, `010` is eight, `12:30` is 750 and `off` is false.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - the base class declares it so
        first: [
            rule
            for rule in rules
            if rule[0] not in {f"tag:yaml.org,2002:{t}" for t in ("bool", "int", "float", "timestamp")}
        ]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is no single value", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def read_yaml(text: str, *, name: str) -> Any:
    """Parse YAML text strictly; `name` is what the error calls it."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - derived from SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name} is not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise ConfigError(f"{name} is not valid YAML: brackets are nested too deep.") from error


def load_config(path: Path, model: type[Model], overrides: Iterable[str] = ()) -> Model:
    """Read, override and check one configuration file.

    Args:
        path: a YAML file with the whole configuration.
        model: the pydantic model it must fit.
        overrides: `key.path=value`, the value read as YAML.

    Raises:
        ConfigError: naming every wrong setting at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Configuration {path} cannot be read: {error}.") from error
    values = read_yaml(text, name=str(path))
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {type(values).__name__}, not settings; it should read like configs/smoke/*.yaml."
        )
    return parse_config(apply_overrides(values, overrides), model, name=str(path))


def parse_config(values: Mapping[str, Any], model: type[Model], *, name: str) -> Model:
    """Check settings against `model`; all errors in one message, misspelt keys with the nearest valid one."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail, model) for detail in error.errors()]
        raise ConfigError(f"{name}:\n  " + "\n  ".join(lines)) from error


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with each `key.path=value` set; unknown paths are refused later, by the model."""
    result = _copy(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"Override {override!r} is not of the form key.path=value.")
        *parents, last = path.split(".")
        section = result
        for parent in parents:
            child = section.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"Override {override!r}: {parent} is a value ({child!r}), not a section.")
            section = child
        section[last] = read_yaml(text, name=f"the value of {override!r}")
    return result


def dump_config(config: BaseModel) -> str:
    """Resolved configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    names = [str(part) for part in detail["loc"]]
    known = _known_keys(model, detail["loc"][:-1])
    # Discriminated unions put the chosen kind into the location; a user wrote no such key.
    path = ".".join(name for i, name in enumerate(names) if not _is_union_tag(model, detail["loc"][:i], name))
    if detail["type"] == "extra_forbidden":
        near = get_close_matches(names[-1], known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*path.split('.')[:-1], near[0]])}?"
            if near
            else f"known here: {', '.join(sorted(known))}."
        )
        return f"{path} is not a setting; {hint}"
    if detail["type"] == "missing":
        return f"{path} is missing."
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "union_tag_invalid":
        return f"{path}.kind = {detail['ctx']['tag']!r} is unknown; choose from {detail['ctx']['expected_tags']}."
    if detail["type"] == "union_tag_not_found":
        return f"{path}.kind is missing."
    if detail["type"] in ("model_type", "dict_type"):
        return f"{path} = {detail['input']!r} is a value; it should be a section of settings."
    if not path or message.startswith(f"{path}."):  # it names the setting by itself
        return f"{message}."
    value = detail["input"]
    shown = f" = {value!r}" if isinstance(value, str | int | float | bool | None) else ""
    return f"{path}{shown}: {message[0].lower()}{message[1:]}."


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    return [member for argument in get_args(annotation) for member in _members(argument)]


def _descend(models: list[type[BaseModel]], part: str | int) -> list[type[BaseModel]]:
    found = [
        m for model in models if part in model.model_fields for m in _members(model.model_fields[str(part)].annotation)
    ]
    if found:
        return found
    tagged = [m for m in models if "kind" in m.model_fields and part in get_args(m.model_fields["kind"].annotation)]
    return tagged or []


def _known_keys(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    models = [model]
    for part in location:
        models = _descend(models, part)
    return [name for m in models for name in m.model_fields]


def _is_union_tag(model: type[BaseModel], location: tuple[str | int, ...], name: str) -> bool:
    models = [model]
    for part in location:
        models = _descend(models, part)
    return bool(models) and all(name not in m.model_fields for m in models) and bool(_descend(models, name))

"""Results of one protocol stand side by side: one group per protocol and set, one system per result."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aroface.errors import ConfigError, DataError
from retrieval.report.wording import protocol_name

__all__ = ["Group", "Record", "System", "group_results", "model_of"]

Record = Mapping[str, Any]


@dataclass(frozen=True)
class System:
    """One model on one set."""

    label: str  #: what columns and lines are called
    record: Record
    is_baseline: bool = False


@dataclass(frozen=True)
class Group:
    """All systems on one set."""

    protocol: str
    title: str
    prefix: str  #: of file names
    systems: tuple[System, ...]

    @property
    def first(self) -> Record:
        """The record that leads."""
        return self.systems[0].record

    @property
    def is_alone(self) -> bool:
        """Whether there is nothing to stand beside."""
        return len(self.systems) == 1


def model_of(record: Record) -> str:
    """The id of its model, or nothing."""
    model = record.get("model") or record.get("inputs", {}).get("model") or {}
    return str(model.get("model_id") or model.get("model") or "")


def group_results(results: Sequence[Record], names: Sequence[str] = ()) -> list[Group]:
    """Groups in the order in which their first result was given.

    Args:
        results: the records.
        names: one label per result; none: the ids of the models, numbered where they do not differ.

    Raises:
        ConfigError: another number of names than of results, or two systems of one name.
        DataError: two results of one protocol are of sets of different sizes, or have other sweeps or versions.
    """
    if names and len(names) != len(results):
        raise ConfigError(f"--names holds {len(names)} names for {len(results)} results; each result needs one.")
    members: dict[tuple[str, str], list[int]] = {}
    for number, record in enumerate(results):
        members.setdefault((str(record["protocol"]), str(record.get("set", record.get("of", "")))), []).append(number)
    groups = []
    for (protocol, data_set), places in members.items():
        own = [results[place] for place in places]
        _check_alike(own)
        title = protocol_name(protocol) + (f" on {data_set}" if data_set and data_set != "faces" else "")
        prefix = "-".join(part for part in (protocol, data_set) if part).replace("/", "-")
        labels = [names[place] for place in places] if names else _labels(own)
        if len(set(labels)) < len(labels):
            raise ConfigError(f"--names calls two results of {protocol} {Counter(labels).most_common(1)[0][0]!r}.")
        systems = [System(label, record) for label, record in zip(labels, own, strict=True)]
        baselines: Mapping[str, Record] = next((r["baselines"] for r in own if r.get("baselines")), {})
        systems += [System(_BASELINES.get(name, name), record, True) for name, record in baselines.items()]
        groups.append(Group(protocol, title, prefix, tuple(systems)))
    return groups


_BASELINES = {"untrained": "untrained", "pixels": "raw pixels"}


def _labels(records: Sequence[Record]) -> list[str]:
    if len(records) == 1:
        return ["trained" if records[0].get("baselines") else "model"]
    ids = [model_of(record) or "model" for record in records]
    seen, found = Counter[str](), []
    for name in ids:
        seen[name] += 1
        found.append(name if ids.count(name) == 1 else f"{name} ({seen[name]})")
    return found


#: Counts that say how large a set is, and not how a model fared on it.
_SIZES = ("pairs", "genuine", "impostor", "probes", "gallery", "mated", "non_mated")


def _levels(record: Record) -> list[tuple[str, list[float]]]:
    """Sweeps and their levels, of FAE-1."""
    return [(sweep["name"], [point["severity"] for point in sweep["points"]]) for sweep in record.get("sweeps", ())]


def _check_alike(records: Sequence[Record]) -> None:
    for record in records[1:]:
        versions = [one.get("protocol_version", 1) for one in (records[0], record)]
        if versions[0] != versions[1]:
            raise DataError(
                f"Two results of {record['protocol']} are of versions {versions[0]} and {versions[1]} of the protocol, "
                "which do not compare; evaluate both anew, or make a report of each."
            )
        if _levels(record) != _levels(records[0]):
            raise DataError(f"Two results of {record['protocol']} have other sweeps; make a report of each.")
        for name in _SIZES:
            one, other = records[0]["counts"].get(name), record["counts"].get(name)
            if one is not None and other is not None and one != other:
                raise DataError(
                    f"Two results of {record['protocol']} do not belong side by side: {name} {one:,} and {other:,}. "
                    "They are of different sets or settings; make a report of each."
                )

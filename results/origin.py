"""Where records come from: days, code revision, commands, hardware and software."""

from collections.abc import Sequence
from typing import Any

from .record import Record
from .rows import hardware_label, started


def origin(records: Sequence[Record]) -> dict[str, list[str]]:
    """What the records say about where they come from: heading -> distinct values, empty ones left out."""

    def distinct(values: Sequence[Any]) -> list[str]:
        return list(dict.fromkeys(str(value) for value in values if value))

    days = sorted(started(record)[:10] for record in records if started(record))
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        packages = record.provenance.get("versions")
        for name, version in sorted(packages.items()) if isinstance(packages, dict) else []:
            versions.setdefault(name, {})[str(version)] = None
    found = {
        "Measured": distinct([days[0], days[-1]]) if days else [],
        "Code revision": distinct([record.provenance.get("revision") for record in records]),
        "Command": distinct([record.provenance.get("command") for record in records]),
        "Hardware": distinct([hardware_label(record) for record in records]),
        "Software": [f"{name} {' and '.join(found)}" for name, found in versions.items()],
    }
    return {heading: values for heading, values in found.items() if values}

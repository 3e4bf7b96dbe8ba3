"""Saved reports: a folder of `kfac-fx transform`, or a file with the JSON of `inspect`, to a document.

Enters: a path. Leaves: a document of schema `kfac_fx.report/1` with all its fields, or one clear error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kfac_fx.errors import KfacFxError
from kfac_fx.report.document import SCHEMA, SCHEMA_FILE

FILE_NAME = "report.json"
_REMEDY = "Write it with `kfac-fx transform TARGET -o DIR` or `kfac-fx inspect TARGET --json`."


def read_report(path: Path) -> dict[str, Any]:
    """The document of a folder or file.

    Raises `KfacFxError` if there is none, if it is no JSON, or if another version of the schema wrote it.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        raise KfacFxError(f"{path} does not exist. {_REMEDY}")
    if not file.exists():
        raise KfacFxError(f"{path} has no {FILE_NAME}. {_REMEDY}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise KfacFxError(f"{file} is not JSON: {error.msg} at {where}. {_REMEDY}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise KfacFxError(f"{file} cannot be read: {error}. {_REMEDY}") from error
    _check_schema(content, file)
    missing = next(_missing(content, _schema(), "", _schema()["$defs"]), None)
    if missing is not None:
        raise KfacFxError(f"{file} lacks {missing}, which {SCHEMA} requires. {_REMEDY}")
    return content


def _schema() -> dict[str, Any]:
    return json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def _check_schema(content: Any, file: Path) -> None:
    name = content.get("schema") if isinstance(content, dict) else None
    if name == SCHEMA:
        return
    family, _, number = str(name).rpartition("/")
    if family == SCHEMA.rpartition("/")[0] and number.isdecimal():
        raise KfacFxError(
            f"{file} has schema {name}; this kfac_fx reads {SCHEMA}. Install the version of kfac_fx that"
            " wrote it, or write the report again with this one."
        )
    raise KfacFxError(f"{file} is not a report: its schema is {name!r}, not {SCHEMA!r}. {_REMEDY}")


def _missing(value: Any, schema: Mapping[str, Any], place: str, defs: Mapping[str, Any]) -> Iterator[str]:
    """Fields that the schema requires and that are not there: `layers[0].cost`."""
    if "$ref" in schema:
        schema = defs[schema["$ref"].rsplit("/", 1)[-1]]
    kinds = schema.get("type", ())
    if value is None and "null" in kinds:
        return
    if "object" in kinds and "properties" in schema:
        if not isinstance(value, dict):
            yield f"an object at {place}"
            return
        for name in schema.get("required", ()):
            inside = f"{place}.{name}" if place else name
            if name not in value:
                yield inside
            else:
                yield from _missing(value[name], schema["properties"][name], inside, defs)
    elif "array" in kinds:
        if not isinstance(value, list):
            yield f"a list at {place}"
            return
        for index, item in enumerate(value):
            yield from _missing(item, schema.get("items", {}), f"{place}[{index}]", defs)

"""The configuration file of `ringplane serve --config`: several disks and their I/O threads, in TOML.

The API describes a disk that is added in the same way.

Each key has the name of the command-line option with the same meaning. docs/config.md describes them.
"""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ringplane.options.api_options import ApiOptions
from ringplane.options.declare import Option, Options, WrongOptions, dashed, declared
from ringplane.options.device_options import MAX_QUEUES
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import TABLES, image_of_table, shown_image
from ringplane.options.kinds import shown, suggestion
from ringplane.options.metrics_options import MetricsOptions
from ringplane.options.process_rules import ProcessRules
from ringplane.options.state_options import StateOptions
from ringplane.options.thread_options import IoThread

Group = TypeVar("Group", bound=Options)

# Converts a TOML value to the one that ringplane uses; raises a ValueError that says what is wrong and what is right.
Check = Callable[[Any], Any]


class ConfigError(Exception):
    """The file cannot be used; `problems` are lines with the file, the table, the key, and what is wrong.

    The text is the first of them.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(problems[0])
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Config:
    """The checked contents of a configuration file."""

    disks: Sequence[DiskConfig]
    io_threads: Sequence[IoThread]
    api: ApiOptions | None = None
    metrics: MetricsOptions | None = None
    state: Path | None = None


@dataclass(frozen=True, slots=True)
class _Table:
    """One of the file's tables, each of whose keys has been checked by itself; error messages call it `place`."""

    place: str
    values: dict[str, Any]


def read_config(path: Path) -> Config:
    """Read and check; raises ConfigError. Nothing is created or opened."""
    config, problems = examine(path)
    if problems:
        raise ConfigError(problems)
    return config


def examine(path: Path) -> tuple[Config, list[str]]:
    """What can be used of a file, and a line for each problem of the rest. Nothing is created or opened."""
    reader = _Reader(path.parent)
    config = Config((), ())
    with reader.noting_problems():
        config = reader.read(_parse(path))
    return config, [f"{path}: {problem}" for problem in reader.problems]


def read_disk(keys: Mapping[str, Any], io_threads: Sequence[str]) -> DiskConfig:
    """A disk described by the keys of a [[disk]] table, with absolute paths; raises ConfigError, WrongOptions.

    Without the key `io-threads` it has all of `io_threads`, in this order.
    """
    reader = _Reader(None)
    table = reader.disk_table("", keys)
    if reader.problems:
        raise ConfigError(reader.problems)
    return reader.disk(table, io_threads)


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8, which TOML requires") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"is not TOML: {error}") from None


class _Reader:
    """Turns the tables of a file in `folder` into a Config. Whatever is wrong becomes one of `problems`.

    Without a folder there are no relative paths.
    """

    def __init__(self, folder: Path | None) -> None:
        self.problems: list[str] = []
        self._folder = folder
        self._rules = ProcessRules()
        self._disks_spread = 0

    @contextlib.contextmanager
    def noting_problems(self, place: str = "") -> Iterator[None]:
        """What a ValueError says becomes a problem of `place`."""
        try:
            yield
        except WrongOptions as error:
            self._note(place, [error])
        except ValueError as error:
            self.problems.append(f"{place}{error}")

    def _note(self, place: str, errors: Iterable[WrongOptions]) -> None:
        self.problems += (f"{place}{error.spelled(dashed)}" for error in errors)

    def read(self, document: dict[str, Any]) -> Config:
        tables = {"api": _one_table, "metrics": _one_table, "disk": _tables, "io-thread": _tables}
        top = self._check_keys(document, tables | self._checks(StateOptions), "")
        api = self._endpoint(top, "api", ApiOptions, "socket", "the API is")
        metrics = self._endpoint(top, "metrics", MetricsOptions, "listen", "metrics are")
        io_threads = self._io_threads(top.get("io_thread") or [{}])
        if not document.get("disk") and "api" not in document:
            raise ValueError("has no disk; a line [[disk]] begins each one")
        disks = []
        for number, keys in enumerate(top.get("disk", ()), 1):
            table = self._numbered_table(number, keys)
            if table.values.keys() >= {"image", "socket_path"}:
                with self.noting_problems(table.place):
                    disks.append(self.disk(table, self._spread([thread.name for thread in io_threads], table)))
                    self._note(table.place, self._rules.add_disk(table.place.removesuffix(": "), disks[-1]))
        return Config(disks, io_threads, api, metrics, top.get("state"))

    def _endpoint(
        self, document: Mapping[str, Any], name: str, group: type[Group], needed: str, what: str
    ) -> Group | None:
        """The table `name`, if there is one: where `what` is served."""
        if name not in document:
            return None
        place, keys = f"[{name}]: ", document[name]
        values = self._check_keys(keys, self._checks(group), place)
        if needed not in keys:
            self.problems.append(f"{place}{needed} is missing; it is where {what} served")
        with self.noting_problems(place):
            return group(**values) if needed in values else None
        return None

    def _check_keys(self, table: Mapping[str, Any], checks: Mapping[str, Check], place: str) -> dict[str, Any]:
        """The values by their Python names."""
        values = {}
        for key, value in table.items():
            if key not in checks:
                self.problems.append(f"{place}unknown key {shown(key)}{suggestion(key, checks)}")
                continue
            with self.noting_problems(f"{place}{key}: "):
                values[key.replace("-", "_")] = checks[key](value)
        return values

    def _checks(self, group: type[Options]) -> dict[str, Check]:
        """The keys of a group of options; those that its documentation describes."""
        return {each.key: self._check(each) for each in declared(group).values() if each.doc}

    def _check(self, option: Option) -> Check:
        kind = option.kind
        return lambda value: kind.with_paths(self._complete, kind.from_toml(value))

    def _complete(self, path: Path) -> Path:
        if self._folder is not None:
            return self._folder / path
        if not path.is_absolute():
            raise ValueError(f"{shown(str(path))} is not an absolute path; it has to begin with /")
        return path

    def _io_threads(self, tables: list[dict[str, Any]]) -> list[IoThread]:
        threads = []
        for number, table in enumerate(tables, 1):
            place = f"[[io-thread]] {number}: "
            values = {"name": f"io{number - 1}"} | self._check_keys(table, self._checks(IoThread), place)
            threads.append(IoThread(values["name"]))
            with self.noting_problems(place):
                threads[-1] = IoThread(**values)
            self._note(place, self._rules.add_thread(threads[-1]))
        return threads

    def _numbered_table(self, number: int, table: Mapping[str, Any]) -> _Table:
        image = table.get("image")
        place = f"[[disk]] {number} ({shown_image(image)}): " if isinstance(image, str) else f"[[disk]] {number}: "
        return self.disk_table(place, table)

    def disk_table(self, place: str, table: Mapping[str, Any]) -> _Table:
        """The keys of a disk, each checked by itself."""
        others = {key: value for key, value in table.items() if key not in TABLES}
        values = self._image_of_table(place, table) | self._check_keys(others, self._checks(DiskConfig), place)
        for name, given in (("image", {"image", *TABLES}), ("socket-path", {"socket-path"})):
            if not given & table.keys():
                self.problems.append(f"{place}{name} is missing; each disk needs one")
        return _Table(place, values)

    def _image_of_table(self, place: str, table: Mapping[str, Any]) -> dict[str, Any]:
        """The image that a table of its own describes, as [disk.rbd] does, if there is one."""
        given = ["image"] if "image" in table else []
        given += (f"[disk.{name}]" for name in TABLES if name in table)
        if len(given) > 1:
            self.problems.append(f"{place}{' and '.join(given[:2])} are both the image of the disk; leave one out")
        for name in sorted(TABLES.keys() & table.keys()):
            with self.noting_problems(f"{place}{name}: "):
                return {"image": image_of_table(name, table[name]).with_paths(self._complete)}
        return {}

    def disk(self, table: _Table, threads: Sequence[str]) -> DiskConfig:
        """Served by the first of these threads, if the table names none. Raises ValueError."""
        values = dict(table.values)
        queues = values.get("num_queues", MAX_QUEUES)
        values["io_threads"] = tuple(values.get("io_threads", ())) or tuple(threads[:queues])
        return DiskConfig(**values)

    def _spread(self, threads: list[str], table: _Table) -> Sequence[str]:
        """All threads, from the next one on: queue 0, which small guests use alone, is on another one for each disk."""
        if table.values.get("io_threads"):
            return threads
        first = self._disks_spread % len(threads)
        self._disks_spread += 1
        return (*threads[first:], *threads[:first])


def _one_table(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("is not a table; write its name in brackets, as in [api]")
    return value


def _tables(value: Any) -> Any:
    if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
        raise ValueError("is not a list of tables; write its name in double brackets, as in [[disk]]")
    return value

"""A policy as JSON: the same for a process that has not read its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ringplane.policies.declaring import fields_of, memory_layout
from ringplane.policies.loading import read_policies, shipped
from ringplane.policies.policy_json import described, program_of

from .policy_texts import own_policy

FILES = sorted({str(path) for path in shipped().values()})


@pytest.mark.parametrize("file", FILES, ids=[Path(each).stem for each in FILES])
def test_what_ships(file: str) -> None:
    for loaded in read_policies(Path(file)):
        program = loaded.program
        other = program_of(json.loads(json.dumps(described(program))))
        assert (other.name, other.data, other.doc) == (program.name, program.data, program.doc)
        assert memory_layout(other.declared) == memory_layout(program.declared)
        for (name, mine), (their_name, theirs) in zip(
            fields_of(program.declared), fields_of(other.declared), strict=True
        ):
            assert name == their_name
            assert type(mine) is type(theirs)
        for name, mine in program.declared.parameters.items():
            theirs = other.declared.parameters[name]
            assert (mine.default, mine.doc, mine.lowest, mine.highest) == (
                theirs.default,
                theirs.doc,
                theirs.lowest,
                theirs.highest,
            )
            assert mine.kind.shown(mine.default) == theirs.kind.shown(theirs.default)
            assert mine.kind.what == theirs.kind.what


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"policy": {"default": 0, "doc": "", "lowest": None, "highest": None, "kind": "size"}}},
        {"parameters": {"a": {"default": "x", "doc": "", "lowest": None, "highest": None, "kind": "size"}}},
        {"parameters": {"a": {"default": 0, "doc": "", "lowest": None, "highest": None, "kind": "none"}}},
        {"parameters": []},
        {"parameters": {"a": {}}},
        {"states": {"a": -1}},
        {"states": {"a": 1 << 40}},
        {"states": {"a": "x"}},
        {"counters": None},
    ],
)
def test_what_is_not_a_description(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "own.py"
    path.write_text(own_policy("return PASS"))
    (loaded,) = read_policies(path)
    with pytest.raises(ValueError, match=": "):
        program_of({**described(loaded.program), **change})

"""Shared heads: what a --heads file may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nnunet_kd.errors import LabelSpaceError
from nnunet_kd.planners.heads import read_heads

MEMBERS = ["Dataset001_Alpha", "Dataset002_Beta"]
LABELS = {"background": 0, "t": 1}
MAPS = {"Dataset001_Alpha": {"lesion": "t"}}


def test_a_file_without_faults(tmp_path: Path) -> None:
    content = {"t": {"labels": LABELS, "members": MAPS}}
    (tmp_path / "heads.json").write_text(json.dumps(content))
    assert read_heads(str(tmp_path / "heads.json"), MEMBERS) == content
    assert read_heads(None, MEMBERS) == {}


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (["a"], "exactly 'labels' and 'members'"),
        ({"labels": LABELS}, "exactly 'labels' and 'members'"),
        ({"labels": ["background"], "members": MAPS}, "consecutive integers"),
        ({"labels": {"background": 0, "t": 2}, "members": MAPS}, "consecutive integers"),
        ({"labels": {"background": 0, "t": "1"}, "members": MAPS}, "consecutive integers"),
        ({"labels": {"background": 0, "t": [1]}, "members": MAPS}, "consecutive integers"),
        ({"labels": {"background": 0, "t": True}, "members": MAPS}, "consecutive integers"),
        ({"labels": {"background": 0}, "members": MAPS}, "at least one class"),
        ({"labels": {"t": 0, "u": 1}, "members": MAPS}, '"background": 0'),
        ({"labels": LABELS, "members": {}}, "at least one member"),
        ({"labels": LABELS, "members": ["Dataset001_Alpha"]}, "at least one member"),
        ({"labels": LABELS, "members": {"Dataset001_Alpha": "t"}}, "must be an object"),
        ({"labels": LABELS, "members": {"Dataset001_Alpha": {"lesion": 1}}}, "must be an object"),
    ],
)
def test_heads_that_are_not_possible(tmp_path: Path, head: Any, named: str) -> None:
    (tmp_path / "heads.json").write_text(json.dumps({"my_head": head}))
    with pytest.raises(LabelSpaceError, match=named) as error:
        read_heads(str(tmp_path / "heads.json"), MEMBERS)
    assert "'my_head'" in str(error.value)


def test_head_with_the_name_of_a_member(tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text(json.dumps({MEMBERS[1]: {"labels": LABELS, "members": MAPS}}))
    with pytest.raises(LabelSpaceError, match=r"'Dataset002_Beta'.*a member has this name"):
        read_heads(str(tmp_path / "heads.json"), MEMBERS)


@pytest.mark.parametrize(("content", "named"), [(None, "does not exist"), ("{", "not valid JSON"), ("[]", "object")])
def test_heads_file(tmp_path: Path, content: str | None, named: str) -> None:
    if content is not None:
        (tmp_path / "heads.json").write_text(content)
    with pytest.raises(LabelSpaceError, match=named):
        read_heads(str(tmp_path / "heads.json"), MEMBERS)

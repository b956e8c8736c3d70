from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_kd.errors import JointDatasetError
from nnunet_kd.spaces.channels import ChannelSpace, channel_names, union

members_of_channels = st.dictionaries(
    st.sampled_from(["A", "B", "C", "D"]),
    st.lists(st.sampled_from(["CT", "T1", "T2", "FLAIR", "PET"]), min_size=1, unique=True),
    min_size=1,
)


def test_channels_are_in_the_order_of_their_numbers_or_else_as_they_stand() -> None:
    numbered = {"10": "PET", "2": "T2", "0": "T1"}
    assert channel_names({"channel_names": numbered}) == channel_names({"modality": numbered}) == ("T1", "T2", "PET")
    assert channel_names({"channel_names": {"T2": "T2", "T1": "T1"}}) == ("T2", "T1")


def test_union_keeps_the_order_of_first_appearance() -> None:
    assert union({"A": ["T2", "T1"], "B": ["CT"], "C": ["T1", "FLAIR"]}).names == ("T2", "T1", "CT", "FLAIR")


@given(members_of_channels)
def test_every_channel_is_found_again(members: dict[str, list[str]]) -> None:
    space = union(members)
    assert sorted(space.names) == sorted({name for own in members.values() for name in own})
    for own in members.values():
        indices = space.indices(own)
        assert [space.names[index] for index in indices] == own


def test_mistakes_are_refused() -> None:
    with pytest.raises(JointDatasetError, match=r"Dataset2.*'T1'"):
        union({"Dataset1": ["T1"], "Dataset2": ["T1", "T2", "T1"]})
    with pytest.raises(JointDatasetError, match=r"'PET'.*'T1', 'T2'"):
        ChannelSpace(("T1", "T2")).indices(["T1", "PET"])

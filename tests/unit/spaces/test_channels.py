from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_kd.errors import JointDatasetError
from nnunet_kd.spaces.channels import ChannelSpace, union

members_of_channels = st.dictionaries(
    st.sampled_from(["A", "B", "C", "D"]),
    st.lists(st.sampled_from(["CT", "T1", "T2", "FLAIR", "PET"]), min_size=1, unique=True),
    min_size=1,
)


def test_union_keeps_the_order_of_first_appearance() -> None:
    assert union({"A": ["T2", "T1"], "B": ["CT"], "C": ["T1", "FLAIR"]}).names == ("T2", "T1", "CT", "FLAIR")


@given(members_of_channels)
def test_every_channel_is_found_again_and_all_others_are_zero(members: dict[str, list[str]]) -> None:
    space = union(members)
    assert sorted(space.names) == sorted({name for own in members.values() for name in own})
    for own in members.values():
        image = torch.randn(2, len(own), 3, 4)
        placed = space.place(image, space.indices(own))
        assert placed.shape == (2, len(space.names), 3, 4)
        for channel, name in enumerate(space.names):
            expected = image[:, own.index(name)] if name in own else torch.zeros(2, 3, 4)
            assert torch.equal(placed[:, channel], expected)


def test_an_image_that_fits_is_returned_itself() -> None:
    space = ChannelSpace(("T1", "T2"))
    image = torch.randn(1, 2, 3, 4, 5, dtype=torch.float16)
    assert space.place(image, space.indices(["T1", "T2"])) is image
    swapped = space.place(image, space.indices(["T2", "T1"]))
    assert torch.equal(swapped, image.flip(1))
    assert swapped.dtype == torch.float16


def test_gradients_reach_the_image() -> None:
    image = torch.randn(1, 1, 2, requires_grad=True)
    weights = torch.tensor([[2.0], [3.0]]).expand(1, 2, 2)
    (ChannelSpace(("T1", "T2")).place(image, (1,)) * weights).sum().backward()
    assert torch.equal(image.grad, torch.full((1, 1, 2), 3.0))


def test_mistakes_are_refused() -> None:
    with pytest.raises(JointDatasetError, match=r"Dataset2.*'T1'"):
        union({"Dataset1": ["T1"], "Dataset2": ["T1", "T2", "T1"]})
    with pytest.raises(JointDatasetError, match=r"'PET'.*'T1', 'T2'"):
        ChannelSpace(("T1", "T2")).indices(["T1", "PET"])
    with pytest.raises(ValueError, match="2 channels, but 1"):
        ChannelSpace(("T1", "T2")).place(torch.zeros(1, 2, 3), (0,))

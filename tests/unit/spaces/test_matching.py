from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_kd.errors import LabelSpaceError
from nnunet_kd.spaces.labels import LabelSpace, match_label_spaces, member_to_head_map


def labels(*names: str, ignore: bool = False) -> LabelSpace:
    all_names = ("background", *names)
    values = tuple((index,) for index in range(len(all_names)))
    return LabelSpace(all_names, values, False, len(all_names) if ignore else None)


def regions(**values: tuple[int, ...]) -> LabelSpace:
    return LabelSpace(tuple(values), tuple(values.values()), True)


BRATS = regions(whole=(1, 2, 3), core=(2, 3), enhancing=(3,))


# --- exclusive labels on both sides -----------------------------------------------------------------------------------
def test_equal_spaces_need_no_map() -> None:
    student_map, teacher_map = match_label_spaces(labels("liver", "tumor", ignore=True), labels("liver", "tumor"))
    assert student_map.is_identity
    assert teacher_map.is_identity
    assert student_map.target is teacher_map.target
    assert student_map.target.ignore == 3


def test_teacher_classes_that_the_student_lacks_are_background() -> None:
    student, teacher = labels("tumor"), labels("liver", "spleen", "tumor")
    student_map, teacher_map = match_label_spaces(student, teacher)
    assert student_map.is_identity
    assert student_map.source == student
    assert teacher_map.source == teacher
    assert teacher_map.groups == ((0, 1, 2), (3,))
    probability = torch.randn(2, 4, 5).log_softmax(1)
    expected = torch.stack([probability[:, :3].exp().sum(1), probability[:, 3].exp()], 1)
    torch.testing.assert_close(teacher_map(probability).softmax(1), expected)


def test_order_of_the_labels_does_not_matter() -> None:
    _, teacher_map = match_label_spaces(labels("liver", "tumor"), labels("tumor", "liver"))
    assert teacher_map.groups == ((0,), (2,), (1,))


def test_a_class_without_counterpart_is_an_error_that_shows_the_map_to_write() -> None:
    with pytest.raises(LabelSpaceError) as error:
        match_label_spaces(labels("liver", "nodule"), labels("liver", "lesion"))
    assert "'nodule'" in str(error.value)
    assert "'lesion'" in str(error.value)
    assert '{"liver": "liver", "nodule": "?"}' in str(error.value)
    assert "'labels' of the teacher" in str(error.value)


def test_mapped_names_one_to_one_keep_the_students_space() -> None:
    student, teacher = labels("nodule", "lung"), labels("organ", "lesion", "vessel")
    student_map, teacher_map = match_label_spaces(student, teacher, {"nodule": "lesion", "lung": "organ"})
    assert student_map.target == student
    assert student_map.is_identity
    assert teacher_map.groups == ((0, 3), (2,), (1,))


def test_labels_that_share_a_teacher_class_are_merged() -> None:
    student, teacher = labels("liver", "left", "right", ignore=True), labels("kidney", "liver", "spleen")
    mapping = {"left": "kidney", "right": "kidney", "liver": "liver", "background": "background", "ignore": "ignore"}
    student_map, teacher_map = match_label_spaces(student, teacher, mapping)
    common = student_map.target
    assert common is teacher_map.target
    assert common == LabelSpace(("background", "liver", "kidney"), ((0,), (1,), (2,)), False, 3)
    assert student_map.groups == ((0,), (1,), (2, 3))
    assert teacher_map.groups == ((0, 3), (2,), (1,))
    assert student_map.lookup_table().tolist() == [0, 1, 2, 2, 3]


def test_labels_can_be_left_to_the_background() -> None:
    mapping = {"edema": "background", "tumor": "tumor"}
    student_map, teacher_map = match_label_spaces(labels("edema", "tumor"), labels("tumor"), mapping)
    assert student_map.groups == ((0, 1), (2,))
    assert teacher_map.is_identity


@pytest.mark.parametrize(
    ("mapping", "parts"),
    [
        ({"nodule": "lesion"}, ["'lung'", '{"nodule": "lesion", "lung": "?"}']),
        ({"nodule": "lesion", "lung": "thorax"}, ["'thorax'", "'organ'"]),
        ({"nodule": "lesion", "lung": "organ", "heart": "organ"}, ["'heart'", "'nodule', 'lung'"]),
        ({"nodule": "lesion", "lung": "organ", "background": "organ"}, ["'background'"]),
        ({"nodule": "background", "lung": "background"}, ["nothing is left", "'lesion'"]),
        ({}, ["'nodule', 'lung'"]),
    ],
)
def test_label_maps_with_mistakes_are_refused(mapping: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(LabelSpaceError) as error:
        match_label_spaces(labels("nodule", "lung"), labels("organ", "lesion"), mapping)
    for part in parts:
        assert part in str(error.value)


@st.composite
def mapped_spaces(draw: st.DrawFn) -> tuple[LabelSpace, LabelSpace, dict[str, str]]:
    student = labels(*(f"student {index}" for index in range(draw(st.integers(1, 5)))))
    teacher = labels(*(f"teacher {index}" for index in range(draw(st.integers(1, 5)))))
    mapping = {name: draw(st.sampled_from(teacher.names)) for name in student.foreground_names}
    mapping[student.names[1]] = draw(st.sampled_from(teacher.foreground_names))
    return student, teacher, mapping


@settings(max_examples=60, deadline=None)
@given(mapped_spaces(), st.integers(0, 2**31 - 1))
def test_both_sides_keep_their_probability_per_teacher_class(
    case: tuple[LabelSpace, LabelSpace, dict[str, str]], seed: int
) -> None:
    student, teacher, mapping = case
    student_map, teacher_map = match_label_spaces(student, teacher, mapping)
    random = torch.Generator().manual_seed(seed)
    student_logits = torch.randn(1, student.num_channels, 4, generator=random)
    teacher_logits = torch.randn(1, teacher.num_channels, 4, generator=random)
    student_mapped, teacher_mapped = student_map(student_logits).softmax(1), teacher_map(teacher_logits).softmax(1)
    assert student_mapped.shape == teacher_mapped.shape == (1, student_map.target.num_channels, 4)

    full = {"background": "background", **mapping}
    used = set(mapping.values()) - {"background"}
    for name in used:
        of_student = [index for index, own in enumerate(student.names) if full[own] == name]
        expected = student_logits.softmax(1)[:, of_student].sum(1)
        of_teacher = teacher_logits.softmax(1)[:, teacher.names.index(name)]
        found = [
            torch.allclose(student_mapped[:, channel], expected, atol=1e-5)
            and torch.allclose(teacher_mapped[:, channel], of_teacher, atol=1e-5)
            for channel in range(student_map.target.num_channels)
        ]
        assert any(found)
    of_background = [index for index, own in enumerate(student.names) if full[own] == "background"]
    torch.testing.assert_close(
        student_mapped[:, 0], student_logits.softmax(1)[:, of_background].sum(1), atol=1e-5, rtol=1e-4
    )
    unused = [index for index, name in enumerate(teacher.names) if name not in used]
    torch.testing.assert_close(teacher_mapped[:, 0], teacher_logits.softmax(1)[:, unused].sum(1), atol=1e-5, rtol=1e-4)


# --- regions ----------------------------------------------------------------------------------------------------------
def test_regions_are_matched_by_name() -> None:
    student = regions(core=(2, 3), whole=(1, 2, 3))
    student_map, teacher_map = match_label_spaces(student, BRATS)
    assert student_map.is_identity
    assert teacher_map.groups == ((1,), (0,))
    _, renamed = match_label_spaces(regions(wt=(1, 2)), BRATS, {"wt": "whole"})
    assert renamed.groups == ((0,),)


def test_regions_without_counterpart_of_their_own_are_refused() -> None:
    with pytest.raises(LabelSpaceError, match="'necrosis'"):
        match_label_spaces(regions(whole=(1, 2), necrosis=(2,)), BRATS)
    with pytest.raises(LabelSpaceError, match=r"'a', 'b'.*'whole'"):
        match_label_spaces(regions(a=(1, 2), b=(2,)), BRATS, {"a": "whole", "b": "whole"})
    with pytest.raises(LabelSpaceError, match="'background'"):
        match_label_spaces(regions(a=(1, 2)), BRATS, {"a": "background"})


def test_a_label_belongs_to_every_region_around_the_one_it_is_mapped_to() -> None:
    student = labels("enhancing", "edema", "necrosis", "skull", ignore=True)
    mapping = {"edema": "whole", "necrosis": "core", "enhancing": "enhancing", "skull": "background"}
    student_map, teacher_map = match_label_spaces(student, BRATS, mapping)
    common = student_map.target
    assert common is teacher_map.target
    assert common.names == ("whole", "core", "enhancing")
    assert common.values == ((1, 2, 3), (1, 3), (1,))
    assert common.ignore == 5
    assert student_map.groups == ((1, 2, 3), (1, 3), (1,))
    assert teacher_map.is_identity
    logits = torch.randn(1, 5, 3)
    torch.testing.assert_close(student_map(logits).sigmoid()[:, 0], logits.softmax(1)[:, 1:4].sum(1))


def test_regions_that_no_label_reaches_are_left_out_unless_others_fill_them() -> None:
    student_map, teacher_map = match_label_spaces(labels("core"), BRATS)
    assert student_map.target.names == ("core",)
    assert teacher_map.groups == ((1,),)

    teacher = regions(kidneys=(1, 2), left=(1,), right=(2,))
    student_map, teacher_map = match_label_spaces(labels("left", "right"), teacher)
    assert student_map.target.names == ("kidneys", "left", "right")
    assert student_map.groups == ((1, 2), (1,), (2,))
    assert teacher_map.is_identity


def test_several_labels_form_one_region() -> None:
    mapping = {"edema": "whole", "rest": "whole"}
    student_map, _ = match_label_spaces(labels("edema", "rest"), BRATS, mapping)
    assert student_map.target.names == ("whole",)
    assert student_map.groups == ((1, 2),)


def test_regions_that_overlap_in_part_cannot_be_formed_from_labels() -> None:
    teacher = regions(first=(1, 2), second=(2, 3))
    with pytest.raises(LabelSpaceError, match="'first' and 'second' overlap"):
        match_label_spaces(labels("first", "second"), teacher)
    student_map, _ = match_label_spaces(labels("first"), teacher)
    assert student_map.target.names == ("first",)


def test_a_teacher_of_labels_can_teach_regions() -> None:
    teacher = labels("necrosis", "edema", "enhancing", "skull")
    mapping = {"whole": "edema", "core": "necrosis", "enhancing": "enhancing"}
    student_map, teacher_map = match_label_spaces(BRATS, teacher, mapping)
    assert student_map.is_identity
    assert teacher_map.target is student_map.target
    assert teacher_map.groups == ((1, 2, 3), (1, 3), (3,))

    student = regions(kidneys=(1, 2), left=(1,), right=(2,))
    _, teacher_map = match_label_spaces(student, labels("right", "left"))
    assert teacher_map.groups == ((1, 2), (2,), (1,))


def test_a_teacher_of_labels_needs_one_for_every_region() -> None:
    with pytest.raises(LabelSpaceError, match="'whole', 'core'"):
        match_label_spaces(BRATS, labels("enhancing"))
    with pytest.raises(LabelSpaceError, match="'whole', 'core' of the student"):
        match_label_spaces(regions(whole=(1, 2), core=(2,)), labels("tumor"), {"whole": "tumor", "core": "tumor"})
    with pytest.raises(LabelSpaceError, match="'background'"):
        match_label_spaces(regions(whole=(1, 2)), labels("tumor"), {"whole": "background"})


# --- shared heads -----------------------------------------------------------------------------------------------------
def test_members_labels_go_to_the_shared_head() -> None:
    member, head = labels("left", "right", ignore=True), labels("lesion", "kidney", ignore=True)
    head_map = member_to_head_map(member, head, {"left": "kidney", "right": "kidney"})
    assert head_map.source is member
    assert head_map.target is head
    assert head_map.groups == ((0,), (), (1, 2))
    assert head_map.lookup_table().tolist() == [0, 2, 2, 3]


def test_what_cannot_share_a_head_is_refused() -> None:
    head = labels("lesion")
    with pytest.raises(LabelSpaceError, match=r"'tumor' of the member.*'lesion'"):
        member_to_head_map(labels("nodule", "tumor"), head, {"nodule": "lesion"})
    with pytest.raises(LabelSpaceError, match="'tumour'"):
        member_to_head_map(labels("nodule"), head, {"nodule": "tumour"})
    with pytest.raises(LabelSpaceError, match="head of its own"):
        member_to_head_map(BRATS, head, {})
    with pytest.raises(LabelSpaceError, match="head of its own"):
        member_to_head_map(labels("nodule"), BRATS, {"nodule": "whole"})
    with pytest.raises(LabelSpaceError, match='"ignore": 2'):
        member_to_head_map(labels("nodule", ignore=True), head, {"nodule": "lesion"})

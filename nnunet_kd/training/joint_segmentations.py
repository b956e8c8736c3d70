"""The members' validation in the joint label map, so that stock nnU-Net can compare a joint teacher's configurations.

``nnUNetv2_find_best_configuration`` looks for one flat folder of predictions and one of references in one label map.
Both are written here from the members' segmentations, as MEMBER-CASE; no image is copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_kd.data.joint import JointDataset
from nnunet_kd.data.member import Member
from nnunet_kd.spaces.labels import LabelSpace


def joint_label_table(joint: JointDataset, member: Member, joint_ignore: int | None) -> np.ndarray:
    """``table[label value of the member] = label of the joint map``, uint16.

    For regions, a label stands for the region that nnU-Net paints with it (``regions_class_order``).
    """
    entry = joint.members[member.name]
    assert entry.head is not None
    own = member.label_space
    offset = 1
    for name, head in joint.heads.items():
        if name == entry.head:
            break
        offset += len(head.label_space.foreground_names)
    head_names = joint.heads[entry.head].label_space.foreground_names
    table = np.zeros(max(*own.label_values, own.ignore or 0) + 1, dtype=np.uint16)
    for name, value in _painted_values(own, member.dataset_json):
        target = name if entry.label_map is None else entry.label_map[name]
        if target in head_names:
            table[value] = offset + head_names.index(target)
    if own.ignore is not None and joint_ignore is not None:
        table[own.ignore] = joint_ignore
    return table


def write_joint_segmentations(
    joint: JointDataset, member: Member, cases: list[str], plans: PlansManager, dataset_json: dict[str, Any], fold: Path
) -> None:
    """Write the member's predictions and references of ``cases`` in the joint label map.

    Predictions are read from ``fold/MEMBER/validation`` and written to ``fold/validation``; references go to
    ``gt_segmentations`` of the joint dataset.
    """
    table = joint_label_table(joint, member, dataset_json["labels"].get("ignore"))
    references = Path(str(nnUNet_preprocessed)) / joint.name / "gt_segmentations"
    predictions = fold / member.name / "validation"
    pairs = ((predictions, fold / "validation"), (member.base_folder / "gt_segmentations", references))
    reader, writer = member.plans_manager.image_reader_writer_class(), plans.image_reader_writer_class()
    for source, target in pairs:
        target.mkdir(parents=True, exist_ok=True)
        for case in cases:
            segmentation, properties = reader.read_seg(str(source / f"{case}{member.dataset_json['file_ending']}"))
            output = target / f"{member.name}-{case}{dataset_json['file_ending']}"
            writer.write_seg(table[segmentation[0].astype(np.int64)], str(output), _with_geometry(properties))


def _painted_values(space: LabelSpace, dataset_json: dict[str, Any]) -> list[tuple[str, int]]:
    if space.regions:
        return list(zip(space.names, dataset_json["regions_class_order"], strict=True))
    return [(name, values[0]) for name, values in zip(space.names[1:], space.values[1:], strict=True)]


def _with_geometry(properties: dict[str, Any]) -> dict[str, Any]:
    """Properties that nnU-Net's 3D writer needs, also for an image that came from a 2D reader."""
    if "sitk_stuff" in properties:
        return properties
    spacing = [float(value) for value in properties["spacing"]][::-1]
    geometry = {"spacing": spacing, "origin": (0.0, 0.0, 0.0), "direction": tuple(np.eye(3).flatten())}
    return {**properties, "sitk_stuff": geometry}

"""Which datasets ``tasks.py`` joins, who learns from the joint teacher, and what is trained instead."""

from __future__ import annotations

from dataclasses import dataclass

from real_data import HIPPOCAMPUS, MONTGOMERY, NODULE, SHENZHEN

BRAIN_TUMOUR, DEMENTIA = "Dataset316_BrainTumorBoxes", "Dataset313_AlzheimerMRI"
COVID, STONE, LIVER = "Dataset312_COVIDCT", "Dataset323_KidneyStoneCT", "Dataset322_LiTSLiverCT2D"
TASK_PLANS = "nnUNetKDPlans"  # the small plans with heads
BATCH_SIZE = 4
RESNET, OWN_NETWORK, ADAMW, RETINANET = "resnet18", "own_network", "control_adamw", "retinanet"
INSTANCE_NORM = "resnet18_instance_norm"
WIDE, WIDE_PLANS = "control_wide", "nnUNetKDPlansWide"
COMPONENTS = "components"


@dataclass(frozen=True)
class Scenario:
    """Members of the joint teacher, who learns from it, and what is trained instead."""

    configuration: str
    joint: int
    members: tuple[str, ...]
    students: tuple[str, ...]
    alternatives: dict[str, tuple[str, ...]]


SCENARIOS = {
    "cxr": Scenario(
        "2d",
        910,
        (MONTGOMERY, SHENZHEN),
        (MONTGOMERY, SHENZHEN),
        {RESNET: (MONTGOMERY, SHENZHEN), ADAMW: (MONTGOMERY, SHENZHEN)},
    ),
    "brain2d": Scenario(
        "2d",
        911,
        (BRAIN_TUMOUR, DEMENTIA),
        (BRAIN_TUMOUR, DEMENTIA),
        {
            RESNET: (BRAIN_TUMOUR, DEMENTIA),
            INSTANCE_NORM: (DEMENTIA,),
            OWN_NETWORK: (BRAIN_TUMOUR, DEMENTIA),
            ADAMW: (BRAIN_TUMOUR, DEMENTIA),
            WIDE: (DEMENTIA,),
            RETINANET: (BRAIN_TUMOUR,),
        },
    ),
    "ct2d": Scenario(
        "2d",
        912,
        (COVID, STONE, LIVER),
        (COVID, STONE),
        {
            RESNET: (COVID,),
            INSTANCE_NORM: (COVID,),
            OWN_NETWORK: (COVID,),
            ADAMW: (COVID,),
            WIDE: (COVID,),
            RETINANET: (STONE,),
        },
    ),
    "lung3d": Scenario("3d_fullres", 913, (NODULE, HIPPOCAMPUS), (NODULE,), {RESNET: (NODULE,), COMPONENTS: (NODULE,)}),
}
KINDS = ("teacher", "control", "student", RESNET, INSTANCE_NORM, OWN_NETWORK, ADAMW, WIDE, RETINANET, COMPONENTS)

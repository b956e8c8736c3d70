"""Build the joint network from the joint dataset's plans, statically, as stock prediction needs it."""

from __future__ import annotations

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_kd.data.joint import TASK_HEADS, JointDataset
from nnunet_kd.networks.joint import JointUNet


def build_joint_network(
    plans_manager: PlansManager, configuration_manager: ConfigurationManager, deep_supervision: bool
) -> JointUNet:
    """The planned U-Net with all input channels and heads of the joint dataset, also those for classes and boxes."""
    joint = JointDataset.from_plans(plans_manager.plans)
    cascaded = configuration_manager.previous_stage_name is not None
    unet = get_network_from_plans(
        configuration_manager.network_arch_class_name,
        configuration_manager.network_arch_init_kwargs,
        configuration_manager.network_arch_init_kwargs_req_import,
        joint.num_input_channels(cascaded),
        joint.num_head_channels,
        allow_init=True,
        deep_supervision=deep_supervision,
    )
    task_heads = configuration_manager.configuration.get(TASK_HEADS)
    return JointUNet(unet, joint.routes(cascaded), joint.network_heads(), task_heads)

"""AdaIN-based domain adaptation: a labelled source, an unlabelled target, translation and self-distillation.

nnUNetv2_train 306 2d 0 -tr nnUNetTrainerAdaIN -p nnUNetKDPlans
"""

from nnunet_kd.training.adaptation import nnUNetTrainerAdaIN

__all__ = ["nnUNetTrainerAdaIN"]

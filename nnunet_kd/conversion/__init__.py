"""Converters from the published layout of public datasets to nnU-Net's raw format."""

from __future__ import annotations

from nnunet_kd.conversion.abdomen import AMOS22, KITS23, SYNAPSE
from nnunet_kd.conversion.acdc import ACDC
from nnunet_kd.conversion.base import Converter
from nnunet_kd.conversion.brain_lesions import BRAIN_MET_SHARE, ISLES_2022
from nnunet_kd.conversion.brats import BRATS_2021, BRATS_2023
from nnunet_kd.conversion.chest_xray14 import CHEST_XRAY14, CHEST_XRAY14_BOXES
from nnunet_kd.conversion.covid_ct import COVID_CT
from nnunet_kd.conversion.deep_lesion import DEEP_LESION
from nnunet_kd.conversion.dementia import ADNI, OASIS_1
from nnunet_kd.conversion.jsrt import JSRT
from nnunet_kd.conversion.lits import LITS
from nnunet_kd.conversion.luna16 import LUNA16
from nnunet_kd.conversion.msd import MSD
from nnunet_kd.conversion.rsna import RSNA
from nnunet_kd.conversion.tuberculosis import MONTGOMERY, SHENZHEN
from nnunet_kd.conversion.vindr import VINDR

CONVERTERS: dict[str, Converter] = {
    converter.name: converter
    for converter in (
        BRAIN_MET_SHARE,
        ISLES_2022,
        BRATS_2021,
        BRATS_2023,
        MSD,
        LITS,
        KITS23,
        SYNAPSE,
        AMOS22,
        ACDC,
        JSRT,
        MONTGOMERY,
        SHENZHEN,
        RSNA,
        VINDR,
        CHEST_XRAY14,
        CHEST_XRAY14_BOXES,
        COVID_CT,
        OASIS_1,
        ADNI,
        LUNA16,
        DEEP_LESION,
    )
}

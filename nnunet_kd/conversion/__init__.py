"""Converters from the published layout of public datasets to nnU-Net's raw format."""

from __future__ import annotations

from nnunet_kd.conversion.acdc import ACDC
from nnunet_kd.conversion.base import Converter
from nnunet_kd.conversion.lits import LITS
from nnunet_kd.conversion.tuberculosis import MONTGOMERY, SHENZHEN

CONVERTERS: dict[str, Converter] = {
    converter.name: converter
    for converter in (
        ACDC,
        LITS,
        MONTGOMERY,
        SHENZHEN,
    )
}

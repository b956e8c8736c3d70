"""Exceptions that a user can meet. Each message says what is wrong, where, and what to do next."""

from __future__ import annotations


class NnUNetKDError(ValueError):
    """Base of every error that a user of nnunet_kd can cause."""


class SettingsError(NnUNetKDError):
    """A key, value or name in the ``nnunet_kd`` settings is unknown or out of range."""


class LabelSpaceError(NnUNetKDError):
    """Two label spaces, or a label map between them, do not fit."""


class JointDatasetError(NnUNetKDError):
    """Members cannot be joined, or changed since the joint dataset was planned."""


class TeacherError(NnUNetKDError):
    """A teacher is missing, cannot be read, or does not fit its student."""


class LeakageError(TeacherError):
    """A teacher was trained on cases that its student validates on."""


class UnlabeledError(NnUNetKDError):
    """Images without labels cannot be added to a dataset, or no longer fit it."""


class AdaptationError(NnUNetKDError):
    """The source or the target of a domain adaptation is missing or unfit, or its training went wrong."""


class ConversionError(NnUNetKDError):
    """A public dataset cannot be converted, or a case of it is left out."""


class DistributedError(NnUNetKDError):
    """Several processes cannot train together as they were started."""

"""The moving average of the student's own weights as a teacher (mean teacher)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_kd.errors import SettingsError, TeacherError
from nnunet_kd.networks.moving_average import MovingAverage
from nnunet_kd.settings import Teacher as TeacherSettings
from nnunet_kd.settings import Term
from nnunet_kd.spaces.labels import match_label_spaces
from nnunet_kd.teachers.base import BatchTeacher, HiddenCases, Student
from nnunet_kd.teachers.output import Taught, TeacherOutput

LOGITS = "teacher_logits"  # key of a batch that was shown to the teacher before it was changed for the student


class EMATeacher(BatchTeacher):
    """The student's network with averaged weights, see :class:`MovingAverage`.

    Source: Tarvainen and Valpola, NeurIPS 2017 (arXiv 1703.01780).

    Raises:
        TeacherError: The student has no segmentation, or a model is named.
    """

    def __init__(self, name: str, settings: TeacherSettings, student: Student) -> None:
        super().__init__(name, settings, student)
        if settings.model:
            raise TeacherError(
                f"Teacher '{name}' is the moving average of its student and has no model, but 'model' is "
                f'\'{settings.model}\'. Remove it, or set "kind": "nnunet".'
            )
        if not student.tasks.segmentation:
            raise TeacherError(f"Teacher '{name}' teaches segmentation, and {student.dataset} has none. Remove it.")
        own = student.label_space
        student_map, self.teacher_map = match_label_spaces(own, own)
        self.taught = Taught(("segmentation",), student_map)

    @property
    def origin(self) -> str:
        """In words, as it has no file."""
        return "moving average of the student's weights"

    def check_term(self, term: Term, where: str) -> None:
        """Raise SettingsError for anything but logits."""
        if term.on != "logits":
            raise SettingsError(
                f"'{where}.on' is '{term.on}', but teacher '{self.name}' is a moving average, which teaches logits "
                f"only. Set it to 'logits', or name another teacher."
            )

    def feature_channels(self, levels: Sequence[str]) -> dict[str, int]:
        """None: terms on features are refused."""
        del levels
        return {}

    def load(
        self,
        device: torch.device,
        levels: Sequence[str],
        tasks: Collection[str],
        compile_network: bool,
        hidden: HiddenCases,
    ) -> None:
        """There are no weights before training starts."""
        del device, levels, tasks, hidden
        self._compile = compile_network

    def follow(self, network: nn.Module) -> None:
        """Start from the student's weights."""
        if not hasattr(getattr(network, "decoder", None), "deep_supervision"):
            raise NotImplementedError(
                f"Teacher '{self.name}' is a moving average, which is not supported of a {type(network).__name__}: its "
                f"deep supervision cannot be switched off as in nnU-Net's networks."
            )
        self.average = MovingAverage(network, self.settings.decay)
        self.network.decoder.deep_supervision = False
        self._forward = torch.compile(self.network) if self._compile else self.network

    @property
    def network(self) -> Any:
        """The student's network with the averaged weights."""
        return self.average.network

    def after_step(self) -> None:
        """Move the average towards the student."""
        self.average.update()

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Logits [B, C, *S] of images [B, C, *S], in float32."""
        with torch.autocast(image.device.type, enabled=image.device.type == "cuda"):
            logits: Tensor = self._forward(image)
        return logits.float()

    def __call__(self, batch: Mapping[str, Any], tasks: Collection[str]) -> TeacherOutput:
        """The logits of a batch; those that the batch carries already, where it was changed for the student since."""
        del tasks
        return TeacherOutput(logits=batch[LOGITS] if LOGITS in batch else self.predict(batch["data"]))

    def state(self) -> dict[str, Any]:
        """Its weights and how many steps it has followed."""
        return self.average.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.average.load_state(state)

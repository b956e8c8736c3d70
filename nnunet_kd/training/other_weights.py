"""Trainers that validate, save and predict with other weights than those that they train (a moving average).

Host behaviour relied on (nnunetv2 2.8): ``run_training`` calls ``on_validation_epoch_start`` and ``_end`` around the
validation of every epoch, and ``on_train_end`` before the final one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from nnunet_kd.training.base import KDTrainer


class PredictsWithOthers(KDTrainer):
    """Comes before another trainer of ours in a class's bases; training goes on from the trained weights."""

    def other_weights(self) -> dict[str, Tensor] | None:
        """``state_dict`` of the network that predicts; None where it is the one that trains."""
        raise NotImplementedError

    @contextmanager
    def _predicting_weights(self) -> Iterator[None]:
        """Within the block the network has the weights with which it will predict."""
        others = self.other_weights()
        if others is None:
            yield
            return
        network = self.unwrapped_network()
        own = {name: value.clone() for name, value in network.state_dict().items()}
        network.load_state_dict(others)
        try:
            yield
        finally:
            network.load_state_dict(own)

    def on_train_start(self) -> None:
        """Start as usual; go on from the trained weights where the checkpoint predicts with others."""
        super().on_train_start()
        if getattr(self, "restored_student", None):
            self.unwrapped_network().load_state_dict(self.restored_student)

    def on_validation_epoch_start(self) -> None:
        """Validate the network that predicts."""
        super().on_validation_epoch_start()
        self._validated = ExitStack()
        self._validated.enter_context(self._predicting_weights())

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Go on with the one that trains."""
        self._validated.close()
        super().on_validation_epoch_end(val_outputs)

    def save_checkpoint(self, filename: str) -> None:
        """Write the network that predicts; the one that trains goes beside it."""
        self.student_weights = {}
        if self.other_weights() is not None:
            own = self.unwrapped_network().state_dict()
            self.student_weights = {name: value.detach().cpu().clone() for name, value in own.items()}
        with self._predicting_weights():
            super().save_checkpoint(filename)

    def on_train_end(self) -> None:
        """Keep the weights that predict for the final validation."""
        super().on_train_end()
        others = self.other_weights()
        if others is not None:
            self.unwrapped_network().load_state_dict(others)

    def checkpoint_extra(self) -> dict[str, Any]:
        """Also the trained weights where others predict."""
        return {**super().checkpoint_extra(), "student_weights": self.student_weights}

    def load_checkpoint_extra(self, extra: dict[str, Any]) -> None:
        """Restore :meth:`checkpoint_extra`."""
        super().load_checkpoint_extra(extra)
        self.restored_student = extra["student_weights"]

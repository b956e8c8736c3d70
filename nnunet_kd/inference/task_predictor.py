"""Stock nnU-Net's prediction of files that also writes classes and boxes.

Host behaviour relied on (nnunetv2 2.8): ``predict_from_files`` lists the cases with ``_manage_input_and_output_lists``,
preprocesses them with ``_internal_get_data_iterator_from_lists_of_filenames`` and hands that iterator to
``predict_from_data_iterator``, which asks for the next case only when the one before has been predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.data_iterators import PreprocessAdapter
from nnunetv2.inference.export_prediction import export_prediction_from_logits

from nnunet_kd.inference.case_predictor import CasePrediction, CasePredictor
from nnunet_kd.inference.task_files import TaskFiles, boxes_in_stored_image

__all__ = ["CasePrediction", "TaskPredictor"]


class TaskPredictor(CasePredictor):
    """Predicts all tasks of cases and of files; everything else is as in :class:`CasePredictor`."""

    _files: TaskFiles | None = None

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
    ) -> Any:
        """As in the stock predictor; :meth:`predict_from_files` with 0 processes."""
        return self.predict_from_files(
            list_of_lists_or_source_folder,
            output_folder_or_list_of_truncated_output_files,
            save_probabilities,
            overwrite,
            0,
            0,
            folder_with_segs_from_prev_stage,
        )

    def _manage_input_and_output_lists(
        self,
        source: str | list[list[str]],
        output: str | list[str] | None,
        previous_stage: str | None = None,
        overwrite: bool = True,
        part_id: int = 0,
        num_parts: int = 1,
        save_probabilities: bool = False,
    ) -> tuple[list[list[str]], list[str] | None, list[str | None]]:
        """Stock lists of images, output names and previous segmentations; without ``overwrite`` of unfinished cases.

        Raises:
            SideFileError: The output folder has a ``classification.csv`` or ``boxes.json`` of another model.
        """
        self._files = None
        is_stock = self._is_stock or output is None
        lists = super()._manage_input_and_output_lists(
            source, output, previous_stage, overwrite or not is_stock, part_id, num_parts, save_probabilities
        )
        if is_stock or not lists[0]:
            return lists
        self._files = self.task_files(Path(lists[1][0]).parent)
        finished = self._files.finished()
        if overwrite:
            return lists
        endings = [self.dataset_json["file_ending"]] if self.segments else []
        endings += [".npz"] if self.segments and save_probabilities else []
        todo = [
            row
            for row in zip(*lists, strict=True)
            if Path(row[1]).name not in finished or not all(Path(row[1] + ending).is_file() for ending in endings)
        ]
        print(f"{len(lists[0]) - len(todo)} cases are predicted already; {len(todo)} are left.")
        images, outputs, previous = ([row[column] for row in todo] for column in range(3))
        return images, outputs, previous

    def task_files(self, folder: Path) -> TaskFiles:
        """The files of the classes and boxes that are predicted, in an output folder."""
        plan = None if self.detection is None else self.detection.plan
        classes, dimension = (None, 0) if plan is None else (plan.classes, plan.dimension)
        return TaskFiles(folder, self.targets, classes, dimension)

    def _internal_get_data_iterator_from_lists_of_filenames(
        self,
        images: list[list[str]],
        previous: list[str | None],
        outputs: list[str] | None,
        num_processes: int,
    ) -> Any:
        """Stock iterator over preprocessed cases; with 0 processes one that preprocesses in this one."""
        if num_processes:
            return super()._internal_get_data_iterator_from_lists_of_filenames(images, previous, outputs, num_processes)
        preprocessor = self.configuration_manager.preprocessor_class(verbose=self.verbose_preprocessing)
        plans = (self.plans_manager, self.dataset_json, self.configuration_manager)
        return PreprocessAdapter(images, previous, preprocessor, outputs, *plans)

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[dict[str, Any]],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
    ) -> Any:
        """As in the stock predictor; classes and boxes are written too where the cases come from files.

        Without a segmentation, or with 0 processes, everything is done in this process.
        """
        files = self._files
        cases = data_iterator if files is None else self._recorded(data_iterator, files)
        try:
            if self.segments and num_processes_segmentation_export:
                return super().predict_from_data_iterator(cases, save_probabilities, num_processes_segmentation_export)
            for case in cases:
                print(f"\nPredicting {Path(case['ofile']).name}:")
                logits = self.predict_logits_from_preprocessed_data(case["data"])
                if self.segments:
                    plans = (self.configuration_manager, self.plans_manager, self.dataset_json)
                    export_prediction_from_logits(
                        logits, case["data_properties"], *plans, case["ofile"], save_probabilities
                    )
            return []
        finally:
            if files is not None:
                files.write()
            self._files = None

    def _recorded(self, cases: Iterable[dict[str, Any]], files: TaskFiles) -> Iterator[dict[str, Any]]:
        """Yield the cases, and write of each what was found in it before the next one is asked for."""
        for case in cases:
            yield case
            probabilities, boxes = self._take_findings()
            if boxes is not None:
                geometry = (case["data_properties"], self.plans_manager.transpose_forward, self._preprocessed_shape)
                boxes = boxes_in_stored_image(boxes, *geometry)
            files.add(Path(case["ofile"]).name, probabilities, boxes)

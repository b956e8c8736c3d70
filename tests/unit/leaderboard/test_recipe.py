from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_kd.leaderboard.recipe import read_recipe
from nnunet_kd.leaderboard.yaml_lines import RecipeError

REFERENCE = "reference:\n  - datasets: [a]\n    metrics: [dice]\n    rows: {Paper: [[0.9]]}\n"


def read(folder: Path, text: str) -> None:
    file = folder / "recipe.yaml"
    file.write_text(text)
    read_recipe(file)


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ("control: {trainer", "control: {trainr", 14, "Unknown key 'methods.control.trainr'. Allowed here: trainer, "),
        ("nnUNetTrainerKDControl", "nnUNetTrainerKDControll", 14, "Did you mean nnUNetTrainerKDControl"),
        ("metrics: [dice, hd95]", "metrics: [dice, hd]", 17, "Unknown metric 'hd'. Did you mean hd95"),
        ("members: [a, b]", "members: [a, c]", 7, "Unknown dataset 'c'. Known: a, b."),
        ("{dataset: b, cases", "{dataset: x, cases", 4, "Unknown dataset 'x'"),
        ("on_joints: [both]", "on_joints: [all]", 15, "Unknown joint dataset 'all'"),
        ("{joint: teacher}", "{joint: teecher}", 13, "Unknown method 'teecher'. Did you mean teacher?"),
        ("control: control", "control: controls", 16, "Unknown method 'controls'"),
        ("control: control", "control: teacher", 16, "'teacher' cannot be the control"),
        ("configurations: [2d]", "configurations: [2D]", 8, "Unknown configuration '2D'"),
        ("{num_epochs: 2}", "{num_epochs: 0}", 11, "'training.num_epochs' is 0"),
        ("{num_epochs: 2}", "{epochs: 2}", 11, "Unknown setting 'training.epochs'"),
        ("folds: [0, 1]", "folds: [0, 0]", 9, "'folds' names 0 twice"),
        ("seeds: [3]", "seeds: [3, -1]", 10, "must not be negative"),
        ("seeds: [3]", "seeds: three", 10, "'seeds' must be a list"),
        ("  b: {id: 2, name: Beta}", "  b: {id: 2}", 5, "'datasets.b' lacks 'name'"),
        ("  b: {id: 2, name: Beta}", "  b: {id: 1, name: Beta}", 5, "has another 'name' elsewhere"),
        ("  b: {id: 2, name: Beta}", "  b: {id: 2, name: Beta}\n  a: {id: 3, name: C}", 6, "'datasets.a' is there"),
        ("both: {id: 900", "both: {id: 1", 7, "needs a free id"),
        ("  control: {trainer", "  control: {title: student, trainer", 14, "is shown as 'student', as 'student' is"),
        ("  b: {id: 2, name: Beta}", "  b: {id: 2, name: Beta, title: a}", 5, "is shown as 'a', as 'a' is"),
        ("  b: {id: 2, name: Beta}", "  b__c: {id: 2, name: Beta}", 5, "becomes a folder"),
        ("  b: {id: 2, name: Beta}", "  b: {id: 2, name: Beta, preparation: [rm -r x]}", 5, "is no command of nnU-Net"),
        ("{dataset: b, cases: validation}", "{images: imagesTs}", 4, "folders of 'images' and 'labels'"),
        ("metrics: [dice, hd95]", "metrics: [dice, auroc]", 17, "No dataset has the task of 'auroc'"),
        ("metrics: [dice, hd95]", "metrics: [dice_percent]", 4, "needs the 'grid' of the protocol"),
        ("metrics: [dice, hd95]", "metrics: []", 17, "'metrics' is empty"),
        ("  b: {id: 2, name: Beta}", "  b: {id: 2, name: Beta, configurations: []}", 5, "configurations' is empty"),
        ("members: [a, b]", "members: [a, a]", 7, "'joints.both.members' names a twice"),
        ("control: {", "control: {datasets: [], ", 14, "'methods.control.datasets' is empty"),
        ("nnUNetTrainerKDTeacher, ", "nnUNetTrainerKDTeacher, teachers: {x: student}, ", 13,
         "teach each other in a circle"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_line(
    tmp_path: Path, recipe_text: str, before: str, after: str, line: int, message: str
) -> None:
    assert before in recipe_text
    with pytest.raises(RecipeError) as error:
        read(tmp_path, recipe_text.replace(before, after, 1))
    assert f"recipe.yaml, line {line}: " in str(error.value)
    assert message in str(error.value)


def test_a_wrong_setting_is_found_in_the_method_that_has_it(tmp_path: Path, recipe_text: str) -> None:
    # the key "on" of a term is no boolean here
    method = (
        "student:\n    trainer: nnUNetTrainerKDStudent\n    teachers: {joint: teacher}\n    settings:\n      terms:\n"
    )
    method += "        - {on: logits, loss: kl}\n        - {on: logits, loss: kl, temperature: -1}"
    text = recipe_text.replace("student: {trainer: nnUNetTrainerKDStudent, teachers: {joint: teacher}}", method)
    with pytest.raises(RecipeError, match=r"line 19: 'terms\[1\].temperature' is -1"):
        read(tmp_path, text)
    read(tmp_path, text.replace("temperature: -1", "temperature: 1"))


def test_trainings_have_names_of_their_own(tmp_path: Path, recipe_text: str) -> None:
    text = recipe_text.replace("  b: {id: 2, name: Beta}", "  b: {id: 2, name: Beta}\n  a_b: {id: 3, name: C}")
    text = text.replace("{joint: teacher}", "{joint: teacher}, datasets: [a, b]")
    text = text.replace("control: {trainer", "b_control: {trainer: nnUNetTrainerKDControl}\n  control: {trainer", 1)
    with pytest.raises(RecipeError, match="line 16: 'control' on 'a_b' and 'b_control' on 'a' are both called"):
        read(tmp_path, text)
    read(tmp_path, text.replace("b_control: {", "b_control: {datasets: [b], "))


@pytest.mark.parametrize(
    ("reference", "line", "message"),
    [
        (REFERENCE, 19, "'reference[0]' lacks 'source'"),
        (REFERENCE + '    source: ""\n', 22, "'source' is empty"),
        (REFERENCE.replace("[a]", "[a, c]") + "    source: page 3\n", 19, "Unknown dataset 'c'"),
        (
            REFERENCE.replace("[[0.9]]", "[[0.9, 1]]") + "    source: page 3\n",
            21,
            "'Paper' must have a list of 1 numbers",
        ),
        (REFERENCE.replace("dice]", "dices]") + "    source: page 3\n", 20, "Unknown metric 'dices'"),
    ],
)
def test_rows_of_papers_need_a_source_and_fit(
    tmp_path: Path, recipe_text: str, reference: str, line: int, message: str
) -> None:
    with pytest.raises(RecipeError) as error:
        read(tmp_path, recipe_text + reference)
    assert f"line {line}: " in str(error.value)
    assert message in str(error.value)


def test_a_student_needs_one_teacher_for_each_of_its_datasets(tmp_path: Path, recipe_text: str) -> None:
    text = recipe_text.replace("  b: {id: 2, name: Beta}", "  b: {id: 2, name: Beta}\n  c: {id: 3, name: Gamma}")
    with pytest.raises(RecipeError, match="line 14: Of the joint datasets of 'teacher', none has 'c' as a member"):
        read(tmp_path, text)
    read(tmp_path, text.replace("teachers: {joint: teacher}", "teachers: {joint: teacher}, datasets: [a, b]"))


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="holds no recipe"):
        read(tmp_path, "[1, 2]")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read(tmp_path, "name: [1")
    with pytest.raises(RecipeError, match="'datasets' is missing"):
        read(tmp_path, "name: x")


def test_merged_keys_keep_their_own_lines(tmp_path: Path, recipe_text: str) -> None:
    text = recipe_text.replace(
        "  b: {id: 2, name: Beta}", "  b: &base {id: 2, name: Beta}\n  c:\n    <<: *base\n    grid: [1, 2]"
    )
    with pytest.raises(RecipeError, match="line 8: 'grid' must be three sizes"):
        read(tmp_path, text)

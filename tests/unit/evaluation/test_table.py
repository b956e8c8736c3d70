"""The summary table: which cases are averaged and paired, and what is printed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.table import markdown_table, summarize, to_markdown, write_table

NAN = float("nan")


def make_rows(values: dict[tuple[str, str, int, int], list[float]], dataset: str = "A") -> pd.DataFrame:
    """Rows of (method, class, fold, seed) -> one value per case."""
    return pd.DataFrame(
        [
            {"dataset": dataset, "method": m, "class": c, "fold": f, "seed": s, "case": f"case_{i}", "dice": value}
            for (m, c, f, s), cases in values.items()
            for i, value in enumerate(cases)
        ]
    )


def test_classes_then_runs_then_cases() -> None:
    rows = make_rows(
        {
            ("control", "organ", 0, 0): [0.8, 0.6],
            ("control", "lesion", 0, 0): [0.4, 0.2],
            ("control", "organ", 0, 1): [0.9, 0.7],
            ("control", "lesion", 0, 1): [0.5, 0.3],
        }
    )
    (line,) = summarize(rows, "control").to_dict("records")
    # per case and run: 0.6 0.4 and 0.7 0.5; per case 0.65 0.45; per run 0.5 0.6
    assert line["num_cases"] == 2
    assert line["num_runs"] == 2
    assert line["mean"] == pytest.approx(0.55)
    assert line["sd_runs"] == pytest.approx(0.1 / math.sqrt(2))
    assert (line["low"], line["high"]) == (pytest.approx(0.45), pytest.approx(0.65))
    assert math.isnan(line["difference"])


def test_paired_by_case_name_not_by_order() -> None:
    control, student = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], [0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75]
    rows = make_rows({("control", "lesion", 0, 0): control, ("student", "lesion", 0, 0): student})
    shuffled = rows.sample(frac=1, random_state=0)
    line = summarize(shuffled, "control").set_index("method").loc["student"]
    assert line["difference"] == pytest.approx(0.05)
    assert line["difference_low"] == pytest.approx(0.05)
    assert (line["wins"], line["losses"], line["ties"]) == (7, 0, 0)
    # equal differences share a rank; all signs alike: 2 of 2^7 patterns
    assert line["p_value"] == pytest.approx(2 / 2**7)


def test_absent_class_is_left_out_of_its_case_and_empty_cases_of_the_table() -> None:
    rows = make_rows({("control", "organ", 0, 0): [0.8, 0.6, NAN], ("control", "lesion", 0, 0): [NAN, 0.2, NAN]})
    (line,) = summarize(rows, "control").to_dict("records")
    assert line["num_cases"] == 2
    assert line["mean"] == pytest.approx((0.8 + 0.4) / 2)


def test_false_positive_counts_against_a_control_that_rightly_predicts_nothing() -> None:
    control, student = [0.8, 0.6, NAN, NAN], [0.9, 0.7, 0.0, NAN]
    rows = make_rows({("control", "lesion", 0, 0): control, ("student", "lesion", 0, 0): student})
    table = summarize(rows, "control").set_index("method")
    # the third case is 1 for the control; nobody has a value for the fourth
    assert table.loc["control", "num_cases"] == table.loc["student", "num_cases"] == 3
    assert table.loc["control", "mean"] == pytest.approx((0.8 + 0.6 + 1.0) / 3)
    assert table.loc["student", "mean"] == pytest.approx((0.9 + 0.7 + 0.0) / 3)
    assert table.loc["student", "num_pairs"] == 3
    assert table.loc["student", "difference"] == pytest.approx((0.1 + 0.1 - 1.0) / 3)
    assert table.loc["student", ["wins", "losses", "ties"]].tolist() == [2, 1, 0]


def test_false_positive_of_one_class_lowers_the_mean_over_the_classes() -> None:
    organ, lesion = [0.8, 0.8], [NAN, NAN]
    rows = make_rows(
        {
            ("control", "organ", 0, 0): organ,
            ("control", "lesion", 0, 0): lesion,
            ("student", "organ", 0, 0): organ,
            ("student", "lesion", 0, 0): [0.0, NAN],
        }
    )
    table = summarize(rows, "control").set_index("method")
    assert table.loc["control", "mean"] == pytest.approx(((0.8 + 1.0) / 2 + 0.8) / 2)
    assert table.loc["student", "mean"] == pytest.approx(((0.8 + 0.0) / 2 + 0.8) / 2)
    assert table.loc["student", "difference"] == pytest.approx((-0.5 + 0.0) / 2)


def test_false_positive_in_one_seed_is_averaged_with_the_empty_prediction_of_the_other() -> None:
    rows = make_rows({("control", "lesion", 0, 0): [0.0], ("control", "lesion", 0, 1): [NAN]})
    (line,) = summarize(rows, "control").to_dict("records")
    assert line["mean"] == pytest.approx(0.5)


def test_right_empty_prediction_has_distance_zero() -> None:
    rows = make_rows({("control", "lesion", 0, 0): [3.0, NAN], ("student", "lesion", 0, 0): [2.0, 40.0]})
    table = summarize(rows, "control", higher_is_better=False).set_index("method")
    assert table.loc["control", "mean"] == pytest.approx(1.5)
    assert table.loc["student", "difference"] == pytest.approx((-1.0 + 40.0) / 2)
    assert table.loc["student", ["wins", "losses"]].tolist() == [1, 1]


def test_only_runs_that_both_have_are_paired() -> None:
    rows = make_rows(
        {
            ("control", "x", 0, 0): [0.8, 0.6],
            ("control", "x", 0, 1): [0.4, 0.2],  # a worse seed, which the student was not trained with
            ("student", "x", 0, 0): [0.9, 0.6],
            ("student", "x", 0, 2): [0.1, 0.1],
        }
    )
    table = summarize(rows, "control").set_index("method")
    assert table.loc["control", "mean"] == pytest.approx((0.6 + 0.4) / 2)
    assert table.loc["student", "mean"] == pytest.approx((0.5 + 0.35) / 2)
    assert table.loc["student", ["num_pairs", "num_paired_runs"]].tolist() == [2, 1]
    assert table.loc["student", "difference"] == pytest.approx((0.1 + 0.0) / 2)
    assert table.loc["student", ["wins", "losses", "ties"]].tolist() == [1, 0, 1]
    assert "2 (1 run)" in to_markdown(table.reset_index())


def test_paired_runs_are_averaged_per_case() -> None:
    rows = make_rows(
        {
            ("control", "x", 0, 0): [0.5, 0.5],
            ("control", "x", 0, 1): [0.7, 0.5],
            ("student", "x", 0, 0): [0.9, 0.4],
            ("student", "x", 0, 1): [0.5, 0.4],
        }
    )
    line = summarize(rows, "control").set_index("method").loc["student"]
    # per case: (+0.4 - 0.2) / 2 and -0.1
    assert line["difference"] == pytest.approx((0.1 - 0.1) / 2)
    assert line[["num_pairs", "num_paired_runs", "wins", "losses"]].tolist() == [2, 2, 1, 1]


def test_no_common_run_is_said() -> None:
    rows = make_rows({("control", "x", 0, 0): [0.5, 0.5], ("student", "x", 0, 1): [0.9, 0.9]})
    line = summarize(rows, "control").set_index("method").loc["student"]
    assert line[["num_pairs", "num_paired_runs"]].tolist() == [0, 0]
    assert math.isnan(line["difference"])
    assert line["note"].startswith("0 pairs")
    assert "0 pairs" in to_markdown(summarize(rows, "control"))


def test_holm_counts_all_comparisons_of_the_table() -> None:
    random = np.random.default_rng(0)
    control = random.random(10)
    tables = [
        make_rows({("control", "x", 0, 0): list(control), ("student", "x", 0, 0): list(control + shift)}, dataset)
        for dataset, shift in (("A", random.random(10)), ("B", random.random(10)))
    ]
    table = summarize(pd.concat(tables), "control")
    compared = table[table["method"] == "student"]
    assert compared["p_value"].tolist() == pytest.approx([2 / 2**10] * 2)
    assert compared["p_holm"].tolist() == pytest.approx([4 / 2**10] * 2)
    assert table[table["method"] == "control"]["p_holm"].isna().all()


def test_folds_with_different_cases() -> None:
    rows = pd.concat(
        [
            make_rows({("control", "x", 0, 0): [0.2, 0.4]}),
            make_rows({("control", "x", 1, 0): [0.6, 0.8]}).replace({"case_0": "case_2", "case_1": "case_3"}),
        ]
    )
    (line,) = summarize(rows, "control").to_dict("records")
    assert (line["num_cases"], line["num_runs"]) == (4, 2)
    assert line["mean"] == pytest.approx(0.5)


def test_order_of_first_appearance_and_dataset_without_control() -> None:
    rows = pd.concat(
        [
            make_rows({("teacher", "x", 0, 0): [0.5, 0.5], ("control", "x", 0, 0): [0.1, 0.2]}, "Z"),
            make_rows({("student", "x", 0, 0): [0.5, 0.5]}, "A"),
        ]
    )
    table = summarize(rows, "control")
    assert table[["dataset", "method"]].to_numpy().tolist() == [["Z", "teacher"], ["Z", "control"], ["A", "student"]]
    assert math.isnan(table.iloc[2]["difference"])


def test_errors_name_the_column_and_the_methods() -> None:
    rows = make_rows({("control", "x", 0, 0): [0.1]})
    with pytest.raises(NnUNetKDError, match="no column 'hd95_mm'"):
        summarize(rows, "control", metric="hd95_mm")
    with pytest.raises(NnUNetKDError, match=r"control 'stock'\. Methods: control"):
        summarize(rows, "stock")


def test_markdown_shows_interval_difference_and_reason() -> None:
    rows = make_rows({("control", "x", 0, 0): [0.5, 0.7], ("student", "x", 0, 0): [0.6, 0.9]})
    lines = to_markdown(summarize(rows, "control")).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "0.600 [0.500, 0.700]" in lines[2]
    assert "0.750 [0.600, 0.900]" in lines[3]
    assert "+0.150 [+0.100, +0.200]" in lines[3]
    assert "2/0/0" in lines[3]
    assert "2 pairs" in lines[3]


def test_files_hold_the_same_numbers(tmp_path: Path) -> None:
    rows = make_rows({("control", "x", 0, 0): [0.5, 0.7], ("student", "x", 0, 0): [0.6, 0.9]})
    table = summarize(rows, "control")
    markdown, comma_separated = write_table(table, tmp_path / "new")
    assert markdown.read_text().strip() == to_markdown(table)
    assert pd.read_csv(comma_separated)["mean"].tolist() == pytest.approx([0.6, 0.75])


def test_a_bar_in_a_title_makes_no_column() -> None:
    assert markdown_table(["a|b"], [["c"]]) == "| a\\|b |\n| ---- |\n| c    |"

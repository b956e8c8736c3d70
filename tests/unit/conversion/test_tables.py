from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_kd.conversion.tables import read_table
from nnunet_kd.errors import ConversionError


def test_what_spreadsheets_add_is_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text('ID, CDR ,"Notes",,\r\nOAS1_0001, 0.5 ,"a, b",,\r\nOAS1_0002,\r\n', encoding="utf-8-sig")
    assert read_table(file, ("ID", "CDR")) == [
        {"ID": "OAS1_0001", "CDR": "0.5", "Notes": "a, b"},
        {"ID": "OAS1_0002", "CDR": "", "Notes": ""},
    ]


def test_missing_files_columns_and_encodings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    with pytest.raises(ConversionError, match=r"There is no .*table\.csv"):
        read_table(file, ())
    file.write_text("ID,Age\n1,2\n")
    with pytest.raises(ConversionError, match="has no column CDR, Group; it has ID, Age"):
        read_table(file, ("ID", "CDR", "Group"))
    file.write_bytes("ID,Größe\n1,2\n".encode("latin-1"))
    with pytest.raises(ConversionError, match="is not UTF-8"):
        read_table(file, ("ID",))

"""Data files of many kinds: compressed, from spreadsheets, from other operating systems, damaged."""

import bz2
import csv
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from propulsion.data.tables import SUFFIXES, read_rows
from propulsion.errors import UserError

ROWS = [{"sentence": "élan", "label": "0"}, {"sentence": "b", "label": "1"}]
JSONL = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in ROWS).encode()
CSV = "sentence,label\nélan,0\nb,1\n".encode()


def read(path, content):
    path.write_bytes(content)
    return list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("a.jsonl", b"\n \n" + JSONL.replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl", JSONL.replace(b"\n", b"\r")),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", b"\n" + json.dumps(ROWS, indent=2).encode()),
        ("a.csv", b"\xef\xbb\xbf" + CSV.replace(b"\n", b"\r\n")),
        ("a.csv", b"\n" + CSV.replace(b"\n", b"\n  \n\n")),
        ("a.csv", CSV.replace(b"sentence,label", b" sentence, label")),
        ("a.tsv", CSV.replace(b",", b"\t").rstrip()),
        ("a.jsonl.gz", gzip.compress(JSONL)),
        ("A.CSV.GZ", gzip.compress(CSV)),
        ("a.tsv.bz2", bz2.compress(CSV.replace(b",", b"\t"))),
        ("a.json.xz", lzma.compress(json.dumps(ROWS).encode())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_are_the_same_however_they_are_written(tmp_path, name, content):
    assert [row.values for row in read(tmp_path / name, content)] == ROWS


@pytest.mark.parametrize("separator", [",", "\t"])
def test_fields_have_any_length_and_csvs_own_limit_stays(tmp_path, separator):
    limit = csv.field_size_limit()
    content = f"sentence{separator}label\n{'x' * 200_000}{separator}1\n".encode()
    rows = read(tmp_path / ("a.csv" if separator == "," else "a.tsv"), content)
    assert len(rows[0].values["sentence"]) == 200_000
    assert csv.field_size_limit() == limit


def test_rows_know_their_lines(tmp_path):
    rows = read(tmp_path / "a.csv", b'\nsentence,label\n"two\nlines",0\n\nb,1\n')
    assert [row.location for row in rows] == ["row 1 (line 3)", "row 2 (line 6)"]
    assert [row.location for row in read(tmp_path / "a.jsonl", b"{}\n\n{}\n")] == ["row 1", "row 2 (line 3)"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "not valid JSON at line 2"),
        ("a.jsonl", b'{"a": 1}\n{"a": 0, "a": 1}\n', "an object names 'a' twice"),
        ("a.jsonl", b'{"a": 1}\n{"a": {"b": 0, "b": 1}}\n', "an object names 'b' twice"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 100_000 + b"\n", "not valid JSON at line 2: maximum recursion"),
        ("a.jsonl", b'{"a": 1}\nnull\n', "expected an object of columns, found NoneType"),
        ("a.jsonl", '{"a": 1}\n{"a": "é"}\n'.encode("latin-1"), "not UTF-8 text .the byte 0xe9"),
        ("a.csv", b"a\n1\nx,y\n", "expected 1 fields, found 2"),
        ("a.csv", "a\n1\né\n".encode("latin-1"), "not UTF-8 text .the byte 0xe9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_that_cannot_be_read_says_so_and_the_rest_is_read(tmp_path, name, content, problem):
    first, second, third = read(tmp_path / name, content + (b"2\n" if name == "a.csv" else b'{"a": 2}\n'))
    assert (first.problem, third.problem) == (None, None)
    assert problem in second.problem.replace("(", ".")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b,a\n", "names a column twice: a, b, a"),
        ("a.csv", "á\n1\n".encode("utf-16"), "line 1 is not UTF-8 text"),
        ("a.csv", b'a,b\n"x" y,1\n', "the row at line 2: .* quotation marks inside a quoted field are written twice"),
        ("a.csv", b'a,b\nx,1\n"y,1\nz,1\n', "the row at line 3: unexpected end of data"),
        ("a.json", b'[{"a": 1},\n{"a": }]', "not valid JSON at line 2"),
        ("a.jsonl.gz", gzip.compress(JSONL * 100)[:-9], "cannot read .*a.jsonl.gz: Compressed file ended"),
        ("a.jsonl.gz", JSONL, "cannot read .*a.jsonl.gz: Not a gzipped file"),
        ("a.csv.bz2", CSV, "cannot read .*a.csv.bz2: Invalid data stream"),
        ("a.csv.xz", CSV, "cannot read .*a.csv.xz: Input format not supported"),
        ("a.parquet", b"", "cannot read .*a.parquet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_cannot_be_read_on(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name, content)
    assert "\n" not in str(caught.value)


def test_parquet_that_names_a_column_twice(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="names a column twice: a, a"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_in_a_file_is_no_row(tmp_path, suffix):
    if suffix != ".parquet":
        opened = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(suffix.split(".")[-1], bytes)
        assert read(tmp_path / f"a{suffix}", opened(b"")) == []
        return
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == []

"""The ground floor of the analyses: results and their folders, atomic writing, the environment of a run, tables.

Needs numpy and the standard library alone, so that reading a result or drawing it again loads no model library.
"""

from analyses.records.environment import environment
from analyses.records.errors import RecordError
from analyses.records.folder import (
    ARRAYS_FILE,
    RESULT_FILE,
    check_writable,
    load_result,
    read_arrays,
    result_folders,
    write_result,
)  # fmt: skip
from analyses.records.result import STAGES, Metric, Result, plain
from analyses.records.tables import Block, format_table, interval, metric_cell, number, summary_of_blocks

__all__ = [
    "ARRAYS_FILE", "RESULT_FILE", "STAGES", "Block", "Metric", "RecordError", "Result", "check_writable",
    "environment", "format_table", "interval", "load_result", "metric_cell", "number", "plain", "read_arrays",
    "result_folders", "summary_of_blocks", "write_result",
]  # fmt: skip

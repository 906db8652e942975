"""Results of the analyses: their fields, their folders on disk, atomic writes, the environment of a run, and tables.

This package imports numpy and the standard library alone, so that reading or redrawing a result loads no model library.
"""

from analyses.records.environment import environment
from analyses.records.errors import RecordError
from analyses.records.folder import (
    ARRAYS_FILE,
    RESULT_FILE,
    SUMS_FILE,
    check_writable,
    load_result,
    read_arrays,
    result_folders,
    write_result,
)  # fmt: skip
from analyses.records.result import STAGES, Metric, Result, plain
from analyses.records.tables import Block, format_table, interval, metric_cell, number, summary_of_blocks

__all__ = [
    "ARRAYS_FILE", "RESULT_FILE", "STAGES", "SUMS_FILE", "Block", "Metric", "RecordError", "Result", "check_writable",
    "environment", "format_table", "interval", "load_result", "metric_cell", "number", "plain", "read_arrays",
    "result_folders", "summary_of_blocks", "write_result",
]  # fmt: skip

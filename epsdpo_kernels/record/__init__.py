"""The record of a run: one row a pair and step, its audit and its report. Needs the extra ``record``."""

from .recorder import SCHEMA, Recorder, parts, read
from .run import Record, set_aside

__all__ = ["SCHEMA", "Record", "Recorder", "parts", "read", "set_aside"]

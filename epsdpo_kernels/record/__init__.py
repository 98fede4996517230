"""The record of a run: one row a pair and step, its audit and its report. Needs the extra ``record``."""

from .recorder import SCHEMA, SPLITS, Recorder, parts, read

__all__ = ["SCHEMA", "SPLITS", "Recorder", "parts", "read"]

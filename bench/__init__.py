"""Measurements: this package beside what people would use instead. Every figure is a ratio within one run."""

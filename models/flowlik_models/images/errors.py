"""What can be wrong with image files."""

from __future__ import annotations


class DataError(ValueError):
    """A file is not what it should be: one line that names the file, what was expected and what was found."""


class MissingDataError(DataError):
    """A data set is not there; the line ends with how to get it."""

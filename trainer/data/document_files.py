"""Former names of `readers.py`."""

import functools

from .messages import join_names, shorten
from .readers import EXTENSIONS, FORMATS, expand_files, read_lines, read_records


__all__ = ["EXTENSIONS", "READERS", "expand_files", "join_names", "read_lines", "read_records", "shorten"]
READERS = {name: functools.partial(read_records, data_format=name) for name in FORMATS}

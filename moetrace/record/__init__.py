"""Count the tokens of each expert while a model trains or serves, and write a trace.

The recorder knows no framework. The adapters lie beside it and import what they need:
`moetrace.record.torch`, `moetrace.record.transformers` and `moetrace.record.distributed`.
"""

from moetrace.formats.readers.parts import read_parts
from moetrace.record.recorder import Recorder, RecordingWarning

__all__ = ["Recorder", "RecordingWarning", "read_parts"]

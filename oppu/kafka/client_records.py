"""Reading what other clients wrote: a header's name that is no UTF-8 must not stop the partition it lies in.

Kafka keeps names as plain bytes, and kafka-python decodes them strictly: one such record would fail every fetch of its
partition for ever. Names that do not decode come out with their bytes escaped (``\\xff``); all others as they are.
"""

from typing import Any

from kafka.record.default_records import DefaultRecordBatch

_strict = DefaultRecordBatch._read_msg  # noqa: SLF001 - there is no public way in


class _Lenient(bytearray):
    """A batch's bytes whose parts decode in any case. Slow, so only a batch that needs it becomes one."""

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return _Lenient(found) if isinstance(key, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        """Decode, by default with an escape for each byte that does not."""
        return super().decode(encoding, errors)


def _read_msg(batch: Any) -> Any:
    try:
        return _strict(batch)
    except UnicodeDecodeError:  # the batch's position is moved after a whole record only
        batch._buffer = _Lenient(batch._buffer)  # noqa: SLF001
        return _strict(batch)


def read_any_header_name() -> None:
    """Make kafka-python read every record; repeating it does nothing."""
    DefaultRecordBatch._read_msg = _read_msg  # noqa: SLF001

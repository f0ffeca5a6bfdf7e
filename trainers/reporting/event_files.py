"""TensorBoard event files, made in memory: its own writer needs a local folder, and a run may have none."""

import io
import numbers
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """The bytes of one event file; each number of a record becomes a scalar of its step."""

    def __init__(self, unix_time: float, purge_from: int | None = None) -> None:
        """From step `purge_from` on TensorBoard drops what earlier files hold: an attempt may go back."""
        self._bytes = io.BytesIO()
        self._records = RecordWriter(self._bytes)
        self._write(Event(wall_time=unix_time, file_version="brain.Event:2"))
        if purge_from is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=unix_time, step=purge_from, session_log=start))

    def add(self, record: dict[str, Any]) -> None:
        """Adds a record of trainers/reporting/metrics.py; an event has no scalars and leaves no trace."""
        group, values = ("validation", record["validation"]) if "validation" in record else ("train", record)
        scalars = [
            Summary.Value(tag=f"{group}/{key}", simple_value=value)
            for key, value in values.items()
            if isinstance(value, numbers.Real) and key not in ("step", "attempt", "time")
        ]
        if scalars and "event" not in record:
            summary = Summary(value=scalars)
            self._write(Event(wall_time=record["time"], step=record["step"], summary=summary))

    def content(self) -> bytes:
        return self._bytes.getvalue()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())

"""Saves and loads as OpenTelemetry spans: a callback for `CheckpointingConfig.build`. Needs ``shardwise[otel]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardwise.errors import ConfigError
from shardwise.timing import Callback, CallRecord

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


def opentelemetry_spans(tracer: Tracer | None = None) -> Callback:
    """A callback that makes a span of each save and load that is over, and one below it for each phase.

    checkpointer = config.build(callbacks=[opentelemetry_spans()])

    Args:
        tracer: Makes the spans; the global provider's tracer ``shardwise`` where it is not given.

    Raises:
        ConfigError: OpenTelemetry's API is not installed.
    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise ConfigError("OpenTelemetry is not installed", hint="Install shardwise[otel].") from error
    own = tracer or trace.get_tracer("shardwise")

    def export(record: CallRecord) -> None:
        about = {
            "shardwise.path": str(record.path),
            "shardwise.rank": record.rank,
            "shardwise.bytes": record.nbytes,
            "shardwise.stall_seconds": record.stall,
        }
        if record.step is not None:
            about["shardwise.step"] = record.step
        begin = int(record.begin * 1e9)
        whole = own.start_span(f"shardwise.{record.call}", start_time=begin, attributes=about)
        inside = trace.set_span_in_context(whole)
        for span in record.spans:
            made = own.start_span(f"shardwise.{span.name}", inside, start_time=span.begin)
            made.set_attribute("thread.name", span.thread)
            made.end(end_time=span.end)
        whole.end(end_time=begin + int(record.seconds * 1e9))

    return export

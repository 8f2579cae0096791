"""The only home of collectives."""

from shardwise.comm.group import Group, JsonValue

__all__ = ["Group", "JsonValue"]

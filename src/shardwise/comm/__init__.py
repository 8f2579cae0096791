"""The only home of collectives."""

from shardwise.comm.group import Group
from shardwise.format.strict_json import JsonValue

__all__ = ["Group", "JsonValue"]

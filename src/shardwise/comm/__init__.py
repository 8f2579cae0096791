"""The only home of collectives."""

from shardwise.comm.group import FirstFailure, Group
from shardwise.comm.lost_ranks import ABSENT_SECONDS
from shardwise.format.strict_json import JsonValue

__all__ = ["ABSENT_SECONDS", "FirstFailure", "Group", "JsonValue"]

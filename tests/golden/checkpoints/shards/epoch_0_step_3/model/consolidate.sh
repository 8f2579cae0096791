#!/bin/sh
exec python -m shardwise consolidate "$(dirname "$0")" "$@"

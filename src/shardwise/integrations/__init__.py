"""shardwise in the training loops of other libraries. A module imports its host; shardwise imports none."""

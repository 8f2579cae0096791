"""A save or a load as a whole: agreeing, planning, staging, writing, reading, in the foreground or the background."""

"""The only place that reads private or undocumented names of other libraries.

Each module is named after the library (of torch by theme; four small ones share `hugging_face`) and has functions with
plain names around the names that the library does not promise to keep. `names` lists all of those, each once, with the
reason; `tests/upstream` checks that every one of them still exists in the installed releases, that the list and the
code here agree, and that no other package of shardwise reads such a name. Nothing is imported here, and libraries that
may be absent are imported inside of functions.
"""

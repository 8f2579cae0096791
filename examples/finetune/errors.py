"""What ends the demo early."""

from __future__ import annotations


class DemoError(Exception):
    """The demo cannot go on; the text says why and what to do. It is no part of the library's error tree."""

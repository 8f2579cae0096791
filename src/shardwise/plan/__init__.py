"""Where every byte lies and who moves it. Pure: no I/O, no collectives."""

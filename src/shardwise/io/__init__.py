"""Bytes in and out: storage, the digesting writer, the byte-range reader, sources, DCP's storage classes."""

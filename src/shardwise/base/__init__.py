"""Base models: finding one, its headers and configuration, initial values, reading it into a model."""

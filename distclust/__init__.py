"""Deep mixture clustering for document collections too large for one machine."""

__version__ = "0.1.0"

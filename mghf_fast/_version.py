"""The version of this library; setup.py reads it too."""

__version__ = "0.1.0"

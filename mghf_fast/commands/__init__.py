"""The command line and its applications; the library imports nothing from here."""

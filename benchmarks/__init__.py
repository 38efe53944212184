"""Measurements of every op and of a whole loss step: `make bench`."""

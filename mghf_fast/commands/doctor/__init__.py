"""Examines what this installation can do on this machine, and why not the rest."""

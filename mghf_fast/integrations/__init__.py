"""The losses in the trainers that people use: a module a trainer, each with that trainer's calling
convention. ``docs/integrations.md`` shows each in use.

Nothing here is imported by ``import mghf_fast``, and a module imports its own trainer only.
"""

"""Adapters for popular trainers: one module per trainer, with that trainer's calling convention.
``docs/integrations.md`` shows each in use.

``import mghf_fast`` imports none of them, and each module imports only its own trainer.
"""

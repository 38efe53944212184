"""Pretraining of the detail feature extractor: ``mghf-fast pretrain``."""

"""Gadgetron pipelines (`*.xml`, which also run in process) and, in `bundles`, the models that ship."""

"""One file each metric; every module here is imported by `fastgen.eval.registry.metrics`."""

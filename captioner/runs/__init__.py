"""The parts that all long jobs share: processes, checkpoints, logs, files. They do not depend on a model."""

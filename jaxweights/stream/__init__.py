"""Transforms checkpoints that do not fit in memory, at the speed of the disk."""

from jaxweights.stream._checkpoint import transform_checkpoint as transform_checkpoint
from jaxweights.stream._run import Streamed as Streamed

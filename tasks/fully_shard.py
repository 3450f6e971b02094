"""FSDP2 over all ranks, by Lightning's strategy for device meshes."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.strategies import ModelParallelStrategy


class FullyShard(ModelParallelStrategy):
    """Every rank is data parallel; left to itself Lightning makes the ranks of a node tensor parallel.

    `Task.configure_model` shards along the mesh's `data_parallel` axis. Checkpoints are single files, as in one process.
    """

    def __init__(self, **others: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **others)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

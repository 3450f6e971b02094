"""Pictures of what an agent attends to in an evaluation: map pieces and other agents, by the weights of one layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from datamodules.batches import SceneBatch
from datamodules.scene import Scene
from models.attention_weights import agent_attention
from models.poses import compose
from tasks.scene_pictures import Keys, draw_attention
from tasks.trajectory import NOW, Trajectory, map_tokens


class AttentionPictures(pl.Callback):
    """Draws, for the first scenes, where one agent looks before its first motion: SCENARIO-attention-OBJECT.png.

    Args:
        folder: where they go.
        scenes: how many; 0 for none.
        agent: the file's id of the object that looks; None for the self-driving car.
        layer: which block; negative ones count from the last.
        head: which head; None for the mean of all.
        extent: metres from the agent to the sides of a picture.

    Raises:
        ValueError: weights are sharded, or there is no such agent, layer or head.
    """

    def __init__(
        self,
        folder: str | Path,
        scenes: int = 1,
        agent: int | None = None,
        layer: int = -1,
        head: int | None = None,
        extent: float = 60.0,
    ) -> None:
        self.folder, self.scenes, self.extent = Path(folder), scenes, extent
        self.agent, self.layer, self.head = agent, layer, head
        self.drawn: list[Path] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.scenes and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "evaluation.callbacks.attention.scenes: the first process asks the model alone, which weights that are"
                " sharded don't allow; use trainer=ddp or trainer=default"
            )

    def keys(self, task: Trajectory, batch: SceneBatch, number: int, query: int) -> list[Keys]:
        """What agent `query` of scene `number` of the batch sees of map and agents at the current step, and its weights.

        Raises:
            ValueError: the agent isn't in the batch, or the model has no such layer or head; names both.
        """
        scene: Scene = batch.scenes[number]
        (place,) = (batch.agent_index[number] == query).nonzero().flatten().tolist() or (None,)
        if place is None:
            name = int(scene.agent_ids[query])
            raise ValueError(f"scenario {scene.scenario_id}: object {name} is not among the agents of the batch")
        tokens = task.tokens(batch).tokens
        found = agent_attention(task.model, tokens, map_tokens(batch), agent=place, step=NOW, scene=number)
        layers, heads = found.map.shape[:2]
        for what, value, size in (("layer", self.layer, layers), ("head", self.head or 0, heads)):
            if not -size <= value < size:
                raise ValueError(f"AttentionPictures: {what}={value}, the model has {size}")
        # the middle of a piece: its start is the end of the one before
        middle = torch.cat((batch.map_points[number, :, 0], torch.zeros_like(batch.map_pose[number, :, :1])), dim=-1)
        pieces = compose(batch.frame[number], compose(batch.map_pose[number], middle).double())
        index = batch.agent_index[number]
        agents = scene.positions[index, scene.current]
        shown = f"layer {self.layer % layers}, {'all heads' if self.head is None else f'head {self.head % heads}'}"
        return [
            self._seen(f"map pieces, {shown}", pieces[:, :2], found.map[self.layer]),
            self._seen(f"agents, {shown}", agents[:, :2], found.agents[self.layer]),
        ]

    def _seen(self, name: str, positions: Tensor, weights: Tensor) -> Keys:
        weight = weights.mean(0) if self.head is None else weights[self.head]
        seen = weight > 0
        return Keys(name, positions[seen].cpu(), weight[seen].float().cpu())

    def _draw(self, trainer: pl.Trainer, task: Trajectory, batch: SceneBatch) -> None:
        if not trainer.is_global_zero:
            return
        for number in range(min(len(batch.scenes), self.scenes - len(self.drawn))):
            scene: Scene = move_data_to_device(batch.scenes[number], "cpu")
            query = scene.sdc
            if self.agent is not None:
                known = scene.agent_ids[scene.simulated()].tolist()
                if self.agent not in known:
                    raise ValueError(
                        f"scenario {scene.scenario_id}: no object {self.agent} at the current step, there are {known}"
                    )
                query = scene.agent_ids.tolist().index(self.agent)
            path = self.folder / f"{scene.scenario_id}-attention-{int(scene.agent_ids[query])}.png"
            draw_attention(scene, query, self.keys(task, batch, number, query), path, extent=self.extent)
            self.drawn.append(path)
            print(f"attention: {path}")

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *others: Any, **named: Any
    ) -> None:
        self._draw(trainer, pl_module, batch)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *others: Any, **named: Any
    ) -> None:
        self._draw(trainer, pl_module, batch)

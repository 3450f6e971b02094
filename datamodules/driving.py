"""The driving datamodule: scenes of any source, viewed, padded and batched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import pytorch_lightning as lightning
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.batches import SceneBatch
from datamodules.resumable import ResumableLoader
from datamodules.scene_batches import collate_scenes
from datamodules.scene_frames import SceneView, ViewedScene, view
from datamodules.scene_sources import SceneSource

Split = Literal["train", "val", "test"]


class ViewedScenes(Dataset[ViewedScene]):
    """A source with every scene viewed when it is read.

    Args:
        source: scenes.
        settings: how they are viewed.
        repeats: times each is read in an epoch.
    """

    def __init__(self, source: SceneSource, settings: SceneView, repeats: int = 1) -> None:
        self.source = source
        self.settings = settings
        self.repeats = repeats
        self.count = len(source)  # type: ignore[arg-type]  # torch's Dataset declares no length

    def __len__(self) -> int:
        return self.count * self.repeats

    def __getitem__(self, index: int) -> ViewedScene:
        return view(self.source[index % self.count], self.settings)


class Driving(lightning.LightningDataModule):
    """Traffic scenes of 91 steps as `SceneBatch`es.

    Training sees what `SceneView` says, held-out splits every agent that a simulation must move, at any distance, in the
    frame without random rotation.

    Args:
        train: opens the training scenes.
        val: opens the validation scenes.
        test: opens the test scenes.
        batch_size: scenes a batch and rank.
        canonical: frames at the self-driving car, along its heading; False keeps those of the scenes.
        rotation: turn training frames by random angles.
        stretch: multiply distances and speeds of training scenes by random factors up to this, and down to its inverse.
        max_agents: agents of a training scene, at most: the nearest to the self-driving car and those with a role.
        max_held_out_agents: agents of a held-out scene; with more it is refused, for none may be left out.
        max_pieces: map pieces of a scene, at most: those nearest to an agent at the current step.
        repeats: times an epoch sees each training scene.
        num_workers: loader processes.
        seed: of the order of training.
        path: for configs to read.
    """

    def __init__(
        self,
        train: Callable[[], SceneSource],
        val: Callable[[], SceneSource],
        test: Callable[[], SceneSource],
        batch_size: int = 4,
        canonical: bool = True,
        rotation: bool = False,
        stretch: float = 1.0,
        max_agents: int | None = 64,
        max_held_out_agents: int | None = None,
        max_pieces: int | None = 1024,
        repeats: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        path: str | None = None,
    ) -> None:
        super().__init__()
        self.sources: dict[Split, Callable[[], SceneSource]] = {"train": train, "val": val, "test": test}
        self.batch_size = batch_size
        self.repeats = repeats
        self.num_workers = num_workers
        self.seed = seed
        if not isinstance(stretch, int | float) or not 1 <= stretch < math.inf:
            raise ValueError(f"datamodule.stretch is {stretch}, expected a number, at least 1")
        caps = {"max_agents": max_agents, "max_held_out_agents": max_held_out_agents}
        counts = {"batch_size": batch_size, "repeats": repeats, **{key: n for key, n in caps.items() if n is not None}}
        for name, count in counts.items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"datamodule.{name} is {count}, expected a whole number, at least 1")
        self.view = SceneView(
            canonical=canonical, rotation=rotation, stretch=stretch, max_agents=max_agents, max_pieces=max_pieces
        )
        self.held_out_view = replace(
            self.view, rotation=False, stretch=1.0, observed=None, max_agents=max_held_out_agents, drop_agents=False
        )
        self.datasets: dict[Split, ViewedScenes] = {}

    def setup(self, stage: str | None = None) -> None:
        """Opens the splits of a stage; the embedded source is fetched by the first process that gets here.

        Args:
            stage: "fit" (train and val), "validate", "test", or None for all three splits.

        Raises:
            ValueError: if a split has no scenes.
            OSError, SourceError: as the sources say.
        """
        splits: dict[str | None, tuple[Split, ...]] = {
            "fit": ("train", "val"), "validate": ("val",), "test": ("test",),
            None: ("train", "val", "test"),
        }  # fmt: skip
        for split in splits[stage]:
            if split not in self.datasets:
                training = split == "train"
                settings, repeats = (self.view, self.repeats) if training else (self.held_out_view, 1)
                scenes = ViewedScenes(self.sources[split](), settings, repeats)
                if len(scenes) == 0:
                    raise ValueError(f"datamodule.{split}: its source has no scenes")
                self.datasets[split] = scenes

    def train_dataloader(self) -> DataLoader[SceneBatch]:
        """Returns shuffled batches; an incomplete last one is dropped.

        Raises:
            ValueError: if not one batch is complete.
        """
        scenes, (rank, world) = cast("Dataset[Any]", self.datasets["train"]), self._rank_and_world()
        count = len(self.datasets["train"])
        if count // world < self.batch_size:
            raise ValueError(
                f"{count} training scenes make no batch of {self.batch_size} on {world} ranks; raise datamodule.repeats"
            )
        sampler: DistributedSampler[Any] = DistributedSampler(scenes, world, rank, seed=self.seed, drop_last=True)
        return ResumableLoader(
            scenes,
            sampler,
            self.batch_size,
            drop_last=True,
            collate_fn=collate_scenes,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[SceneBatch]:
        """Returns batches of the validation scenes, in order.

        Raises:
            ValueError: if there are fewer scenes than ranks.
        """
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader[SceneBatch]:
        """Returns batches of the test scenes, in order.

        Raises:
            ValueError: if there are fewer scenes than ranks.
        """
        return self._held_out("test")

    def _held_out(self, split: Split) -> DataLoader[SceneBatch]:
        rank, world = self._rank_and_world()
        if (count := len(self.datasets[split])) < world:  # Lightning ends in a traceback on the ranks without any
            raise ValueError(f"datamodule.{split}: {count} scenes for {world} ranks; each needs one, so use fewer")
        return DataLoader(
            cast("Dataset[Any]", self.datasets[split]),
            batch_size=self.batch_size,
            sampler=range(rank, len(self.datasets[split]), world),
            num_workers=self.num_workers,
            collate_fn=collate_scenes,
            persistent_workers=self.num_workers > 0,
        )

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

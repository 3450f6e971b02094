"""The text datamodule: any source in any tokens, read as strands in training and as windows or strands in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytorch_lightning as lightning
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import TokenBatch
from datamodules.embedded_source import cache_folder
from datamodules.resumable import EpochSteps, ResumableLoader, only
from datamodules.text_documents import Split, TextSource
from datamodules.text_streams import DocumentStream, EvaluationWindows, TrainingStrands
from datamodules.token_files import TokenFile, keep_tokenizer, learnt, open_token_files, write_token_files
from datamodules.tokens import FILE, Encoder, Tokens


class Text(lightning.LightningDataModule):
    """Text as `TokenBatch`es.

    Token files are written once into the cache; what tokens were learnt is kept in the trainer's folder as well, beside the
    checkpoints. Training shuffles documents anew each epoch and gives each row a strand of
    their stream that it reads from step to step; held-out splits are read in order, every token predicted once.

    Args:
        source: documents.
        tokens: how text becomes ids.
        vocabulary: number of ids, for configs to read; must be that of `tokens`.
        bos: the id that begins a document, for configs to read; must be that of `tokens`.
        batch_size: strands a rank.
        segment: tokens of a step.
        eval_batch_size: rows a rank in evaluation; None for `batch_size`.
        context: tokens of an evaluation window, each read from nothing; None reads strands on from batch to batch.
        limit_tokens: tokens of each split to use, from its start; None for all.
        num_workers: loader processes.
        seed: of the order of training.
        cache: the cache folder where it is not the usual one.
        path: for configs to read.

    Raises:
        ValueError: if a number isn't one, or not that of `tokens`.
    """

    def __init__(
        self,
        source: TextSource,
        tokens: Tokens,
        vocabulary: int,
        bos: int,
        batch_size: int = 16,
        segment: int = 512,
        eval_batch_size: int | None = None,
        context: int | None = None,
        limit_tokens: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache: str | Path | None = None,
        path: str | Path | None = None,
    ) -> None:
        super().__init__()
        if (vocabulary, bos) != (tokens.size, tokens.bos):
            raise ValueError(
                f"datamodule.vocabulary and bos are {vocabulary} and {bos}, those of {tokens.name} tokens "
                f"are {tokens.size} and {tokens.bos}"
            )
        eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        counts = {"batch_size": batch_size, "segment": segment, "eval_batch_size": eval_batch_size}
        counts |= {} if context is None else {"context": context}
        counts |= {} if limit_tokens is None else {"limit_tokens": limit_tokens}
        for key, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"datamodule.{key} is {count}, expected a whole number, at least 1")
        for key, count in {"num_workers": num_workers, "seed": seed}.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"datamodule.{key} is {count}, expected a whole number, at least 0")
        self.source = source
        self.tokens = tokens
        self.vocabulary = vocabulary
        self.bos = bos
        self.batch_size = batch_size
        self.segment = segment
        self.eval_batch_size = eval_batch_size
        self.context = context
        self.limit_tokens = limit_tokens
        self.num_workers = num_workers
        self.seed = seed
        self.cache = Path(cache) if cache else cache_folder()
        self.files: dict[Split, TokenFile] = {}
        self.encoder: Encoder | None = None
        self.learnt = ""

    def prepare_data(self) -> None:
        """Fetches the source and writes its token files where the cache lacks them."""
        write_token_files(self.source, self.tokens, self.cache)

    def setup(self, stage: str | None = None) -> None:
        """Opens the token files; the first process that gets here writes them where they are missing.

        Args:
            stage: "fit" (train and val), "validate", "test", or None for all three splits.

        Raises:
            ValueError: if a split of the stage has no documents.
            OSError, ValueError: as the source and the tokens say.
        """
        splits: dict[str | None, tuple[Split, ...]] = {
            "fit": ("train", "val"), "validate": ("val",), "test": ("test",),
            None: ("train", "val", "test"),
        }  # fmt: skip
        folder = write_token_files(self.source, self.tokens, self.cache)
        self.encoder = self.tokens.load(folder)
        if stage == "fit" and self.trainer is not None and self.trainer.is_global_zero:
            keep_tokenizer(folder, Path(self.trainer.default_root_dir))
        self.learnt = learnt(folder)
        files = open_token_files(folder)
        for split in splits[stage]:
            if not files[split].names:
                raise ValueError(
                    f"{self.source.name}: no documents in the {split} split; a separator makes more documents of a "
                    "file, and splits can be given"
                )
            self.files[split] = files[split]

    def state_dict(self) -> dict[str, str]:
        """The sha256 of what the tokens were learnt, for checkpoints; empty where they learn nothing."""
        return {"learnt": self.learnt} if self.learnt else {}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Compares.

        Raises:
            ValueError: if a run that is resumed had other tokens.
        """
        if state["learnt"] != self.learnt:
            raise ValueError(
                f"{self.source.name}: the checkpoint's tokens aren't those of this text; set "
                f"datamodule.tokens.path to the {FILE} beside the checkpoint"
            )

    def train_dataloader(self) -> DataLoader[TokenBatch]:
        """Returns the strands of this rank step by step; resuming goes on at the next step.

        Raises:
            ValueError: if the training text is too short for one step.
        """
        file, encoder = self._open("train")
        rank, world = self._rank_and_world()
        strands = TrainingStrands(
            file,
            encoder.bytes_per_token,
            self.batch_size,
            self.segment,
            rank=rank,
            world=world,
            seed=self.seed,
            limit=self.limit_tokens,
            name=f"{self.source.name}, train split",
        )
        return ResumableLoader(
            cast("Dataset[Any]", strands),
            EpochSteps(len(strands)),
            1,
            collate_fn=only,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[TokenBatch]:
        """Returns the windows of this rank in order.

        Raises:
            ValueError: if the validation text is too short.
        """
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader[TokenBatch]:
        """Returns the windows of this rank in order.

        Raises:
            ValueError: if the test text is too short.
        """
        return self._held_out("test")

    def _held_out(self, split: Split) -> DataLoader[TokenBatch]:
        file, encoder = self._open(split)
        rank, world = self._rank_and_world()
        windows = EvaluationWindows(
            DocumentStream(file, encoder.bytes_per_token, limit=self.limit_tokens),
            self.eval_batch_size,
            self.segment,
            self.context,
            rank=rank,
            world=world,
            name=f"{self.source.name}, {split} split",
        )
        return DataLoader(
            windows,
            batch_size=1,
            collate_fn=only,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _open(self, split: Split) -> tuple[TokenFile, Encoder]:
        if self.encoder is None or split not in self.files:
            raise RuntimeError(f"{split}: call setup first")
        return self.files[split], self.encoder

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

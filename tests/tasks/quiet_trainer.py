"""A Lightning trainer that leaves nothing behind and says nothing."""

import pytorch_lightning as pl


def trainer(tmp_path, **changes):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", **{**quiet, **changes})

"""Makes motion_goldens.json with Waymo's own op, in an environment of its own (Python 3.11, 2.8 GB):

python -m venv waymo && waymo/bin/pip install waymo-open-dataset-tf-2-12-0==1.6.7
cd tests/tasks/metrics && ../../../waymo/bin/python make_motion_goldens.py
"""

import json
from pathlib import Path

import motion_scenarios
import numpy as np
from google.protobuf import text_format
from waymo_open_dataset.metrics.ops import py_metrics_ops
from waymo_open_dataset.metrics.python import config_util_py
from waymo_open_dataset.protos import motion_metrics_pb2

CONFIG = """
track_steps_per_second: 10 prediction_steps_per_second: 2 track_history_samples: 10 track_future_samples: 80
speed_lower_bound: 1.4 speed_upper_bound: 11.0 speed_scale_lower: 0.5 speed_scale_upper: 1.0 max_predictions: 6
step_configurations { measurement_step: 5 lateral_miss_threshold: 1.0 longitudinal_miss_threshold: 2.0 }
step_configurations { measurement_step: 9 lateral_miss_threshold: 1.8 longitudinal_miss_threshold: 3.6 }
step_configurations { measurement_step: 15 lateral_miss_threshold: 3.0 longitudinal_miss_threshold: 6.0 }
"""
METRICS = ("min_ade", "min_fde", "miss_rate", "overlap_rate", "map")
SECONDS = {"5": "3s", "9": "5s", "15": "8s"}


def measure(scenarios):
    """Metric → value by the op; -1 where nothing was measured."""
    config = text_format.Parse(CONFIG, motion_metrics_pb2.MotionMetricsConfig())

    def batch(name, dtype):
        return np.array([scenario[name] for scenario in scenarios], dtype)

    results = py_metrics_ops.motion_metrics(
        config=config.SerializeToString(),
        prediction_trajectory=batch("trajectories", np.float32),
        prediction_score=batch("scores", np.float32),
        ground_truth_trajectory=batch("states", np.float32),
        ground_truth_is_valid=batch("valid", bool),
        prediction_ground_truth_indices=batch("indices", np.int64),
        prediction_ground_truth_indices_mask=batch("mask", bool),
        object_type=batch("types", np.int64),
    )
    found = {}
    for place, name in enumerate(config_util_py.get_breakdown_names_from_motion_config(config)):
        _, kind, step = name.split("_")
        for metric, values in zip(METRICS, results, strict=True):
            found[f"{metric}/{kind.lower()}/{SECONDS[step]}"] = round(float(values[place]), 9)
    return found


if __name__ == "__main__":
    goldens = {name: measure(make()) for name, make in motion_scenarios.CASES.items()}
    Path(__file__).with_name("motion_goldens.json").write_text(json.dumps(goldens, indent=1) + "\n")

"""The motion-forecasting metrics of the Waymo Open Motion Dataset (arXiv 2104.10133) as one torchmetrics metric.

minADE, minFDE, miss rate, overlap rate, mAP and soft mAP, for vehicles, pedestrians and cyclists, at 3, 5 and 8 seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.scene import AgentType
from tasks.metrics import motion_average_precision as precision
from tasks.metrics.motion_average_precision import BUCKETS, Outcome
from tasks.metrics.motion_displacement import displacements, min_average, min_final
from tasks.metrics.motion_miss_rate import HORIZONS, matches, misses
from tasks.metrics.motion_overlap import overlaps
from tasks.metrics.motion_tracks import MAX_PREDICTIONS, Groups, MotionPrediction, MotionTracks, check, gather

TYPES = (AgentType.VEHICLE, AgentType.PEDESTRIAN, AgentType.CYCLIST)
MEANS = ("min_ade", "min_fde", "miss_rate", "overlap_rate")
PRECISIONS = ("map", "soft_map")


def group_types(groups: Groups) -> Tensor:
    """(m,) index into `TYPES` of the rarest kind in each group (cyclist, pedestrian, vehicle); −1 where there is none."""
    found = torch.full(groups.types.shape[:1], -1, dtype=torch.int64, device=groups.types.device)
    for index, kind in enumerate(TYPES):
        found = torch.where((groups.types == kind).any(1), index, found)
    return found


class MotionForecasting(Metric):
    """Accumulates predictions scenario by scenario; sharding and order don't change the result.

    `compute` returns scalars named `min_ade/vehicle/3s` and so on for each of min_ade and min_fde (metres), miss_rate,
    overlap_rate, map and soft_map; `min_ade/vehicle` is their mean over the horizons and `min_ade` the mean over the
    types. What was never measured is NaN and left out of means. Groups of other types are not measured.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    truths: Tensor
    confidences: list[Tensor]
    samples: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        shape = (len(MEANS), len(TYPES), len(HORIZONS))
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        truths = torch.zeros((len(TYPES), len(HORIZONS), BUCKETS), dtype=torch.int64)
        self.add_state("truths", truths, dist_reduce_fx="sum")
        # Both lists are flat and float32, as is what torchmetrics gathers from a process that saw no data.
        self.add_state("confidences", [], dist_reduce_fx="cat")
        self.add_state("samples", [], dist_reduce_fx="cat")

    def update(self, prediction: MotionPrediction, tracks: MotionTracks) -> None:
        """Judge the predictions for one scenario, on the device of the metric.

        Raises:
            ValueError: if the prediction doesn't fit the tracks or isn't finite.
        """
        prediction = MotionPrediction(*(part.to(self.device) for part in prediction))
        tracks = MotionTracks(*(part.to(self.device) for part in tracks))
        check(prediction, tracks)
        trajectories = prediction.trajectories[:, :MAX_PREDICTIONS]
        # As the challenge does, confidences become shares before the most confident is chosen, in float32.
        confidences = prediction.confidences[:, :MAX_PREDICTIONS].float()
        groups = gather(tracks, prediction.agents)
        trajectories = torch.where(groups.member[:, None, :, None, None], trajectories, 0.0)
        types = group_types(groups)
        errors = displacements(trajectories, groups)
        hits = overlaps(trajectories, self._shares(prediction.confidences), prediction.agents, groups, tracks)
        bucket, known = precision.buckets(tracks, prediction.agents)
        everyone = torch.ones_like(known)
        for index, horizon in enumerate(HORIZONS):
            matched, measured = matches(trajectories, groups, horizon)
            rows = (
                min_average(errors, groups, horizon.step),
                min_final(errors, groups, horizon.step),
                misses(matched, measured),
                (hits[:, : horizon.step + 1].any(1).double(), everyone),
            )
            for row, (value, counted) in enumerate(rows):
                counted = counted & (types >= 0)
                self.sums[row, :, index].index_add_(0, types[counted], value[counted].to(self.sums))
                self.counts[row, :, index] += types[counted].bincount(minlength=len(TYPES))
            judged = measured & known & (types >= 0)
            place = (types[judged] * len(HORIZONS) + index) * BUCKETS + bucket[judged]
            self.truths += place.bincount(minlength=self.truths.numel()).view_as(self.truths)
            outcome = precision.outcomes(matched[judged], confidences[judged])
            self.confidences.append(confidences[judged].flatten())
            self.samples.append((place[:, None] * len(Outcome) + outcome).flatten().float())

    @staticmethod
    def _shares(confidences: Tensor) -> Tensor:
        total = confidences.float().sum(1, keepdim=True)
        shares = torch.where(total == 0, 1.0, confidences.float()) / torch.where(total == 0, 1.0, total)
        return shares[:, :MAX_PREDICTIONS]

    def compute(self) -> dict[str, Tensor]:
        """All metrics so far; see the class."""
        table = self.sums / self.counts  # (4, types, horizons), NaN where nothing was measured
        table = torch.cat((table, self._precisions().to(table)))
        result: dict[str, Tensor] = {}
        for name, values in zip((*MEANS, *PRECISIONS), table, strict=True):
            result[name] = values.nanmean(1).nanmean()
            for kind, row in zip(TYPES, values, strict=True):
                result[f"{name}/{kind.name.lower()}"] = row.nanmean()
                for horizon, value in zip(HORIZONS, row, strict=True):
                    result[f"{name}/{kind.name.lower()}/{horizon.seconds}s"] = value
        return result

    def _precisions(self) -> Tensor:
        confidences, samples = (
            torch.cat(state) if isinstance(state, list) and state else torch.as_tensor(state, device=self.device)
            for state in (self.confidences, self.samples)
        )
        place = samples.long() // len(Outcome)
        outcome = samples.long() % len(Outcome)
        result = torch.full((2, *self.truths.shape), torch.nan, dtype=torch.float64)
        for index in self.truths.flatten().nonzero().flatten().tolist():
            here = place == index
            kept = here & (outcome != Outcome.REPEATED)
            truths = int(self.truths.flatten()[index])
            for row, chosen in enumerate((here, kept)):
                positive = outcome[chosen] == Outcome.TRUE
                area = precision.average_precision(confidences[chosen], positive, truths)
                result[row].view(-1)[index] = area
        return result.nanmean(-1)

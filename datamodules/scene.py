"""`Scene`: one recorded traffic scenario as tensors, whatever file it came from, and the names of its integer codes."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class AgentType(IntEnum):
    """Codes of the Waymo Open Motion Dataset."""

    UNSET = 0
    VEHICLE = 1
    PEDESTRIAN = 2
    CYCLIST = 3
    OTHER = 4


class FeatureType(IntEnum):
    """Kinds of map feature, numbered as in the dataset's tf.Example files; 14 is not used there."""

    LANE_UNDEFINED = 0
    LANE_FREEWAY = 1
    LANE_SURFACE = 2
    LANE_BIKE = 3
    LINE_UNKNOWN = 5
    LINE_BROKEN_WHITE = 6
    LINE_SOLID_WHITE = 7
    LINE_DOUBLE_WHITE = 8
    LINE_BROKEN_YELLOW = 9
    LINE_BROKEN_DOUBLE_YELLOW = 10
    LINE_SOLID_YELLOW = 11
    LINE_DOUBLE_YELLOW = 12
    LINE_PASSING_DOUBLE_YELLOW = 13
    EDGE_BOUNDARY = 15
    EDGE_MEDIAN = 16
    STOP_SIGN = 17
    CROSSWALK = 18
    SPEED_BUMP = 19
    DRIVEWAY = 20
    EDGE_UNKNOWN = 21


class LightState(IntEnum):
    """What a traffic light shows its lane, numbered as in the dataset."""

    UNKNOWN = 0
    ARROW_STOP = 1
    ARROW_CAUTION = 2
    ARROW_GO = 3
    STOP = 4
    CAUTION = 5
    GO = 6
    FLASHING_STOP = 7
    FLASHING_CAUTION = 8


class Scene(NamedTuple):
    """A scenario: a agents over t steps of 0.1 s, m map features of p points in all, l traffic lights.

    Lengths are metres, angles radians, coordinates relative to `origin`, which was subtracted in float64. Values of an
    agent where `valid` is False are zero.

    Attributes:
        scenario_id: the dataset's name of the scenario.
        origin: (3,) float64; added to coordinates it gives those of the file.
        times: (t,) float64 seconds.
        current: index of the current step (10 in the dataset); later steps are the future.
        agent_ids: (a,) int64.
        agent_types: (a,) int64, `AgentType`.
        positions: (a, t, 3) float32, centres of the boxes.
        sizes: (a, t, 3) float32: length, width, height.
        headings: (a, t) float32 as in the file, not wrapped.
        velocities: (a, t, 2) float32 metres a second.
        valid: (a, t) bool.
        sdc: index of the self-driving car among the agents.
        to_predict: (k,) int64 indices of agents.
        difficulties: (k,) int64 of `to_predict`, 0 where the file says nothing.
        of_interest: (i,) int64 indices of agents.
        feature_ids: (m,) int64.
        feature_types: (m,) int64, `FeatureType`.
        feature_starts: (m + 1,) int64; feature j has points[feature_starts[j] : feature_starts[j + 1]].
        points: (p, 3) float32.
        light_lanes: (l,) int64, `feature_ids` of the lanes that the lights rule.
        light_states: (t, l) int64, `LightState`; UNKNOWN where a step doesn't tell.
        light_stops: (t, l, 3) float32, where vehicles stop; zero where `light_valid` is False.
        light_valid: (t, l) bool, whether the step has an entry for the light.
    """

    scenario_id: str
    origin: Tensor
    times: Tensor
    current: int
    agent_ids: Tensor
    agent_types: Tensor
    positions: Tensor
    sizes: Tensor
    headings: Tensor
    velocities: Tensor
    valid: Tensor
    sdc: int
    to_predict: Tensor
    difficulties: Tensor
    of_interest: Tensor
    feature_ids: Tensor
    feature_types: Tensor
    feature_starts: Tensor
    points: Tensor
    light_lanes: Tensor
    light_states: Tensor
    light_stops: Tensor
    light_valid: Tensor

    @property
    def steps(self) -> int:
        """t."""
        return self.times.shape[0]

    @property
    def agents(self) -> int:
        """a."""
        return self.agent_ids.shape[0]

    def simulated(self) -> Tensor:
        """(s,) indices of the agents that a simulation must move: valid at the current step."""
        return self.valid[:, self.current].nonzero().flatten()

    def scored(self) -> Tensor:
        """(e,) sorted indices of the agents that are scored: the self-driving car and `to_predict`."""
        return torch.unique(torch.cat((self.to_predict, self.to_predict.new_tensor([self.sdc]))))

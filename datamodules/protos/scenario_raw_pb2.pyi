from datamodules.protos import scenario_pb2 as _scenario_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RawTrack(_message.Message):
    __slots__ = ("id", "object_type", "states")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_TYPE_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    id: int
    object_type: int
    states: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, id: _Optional[int] = ..., object_type: _Optional[int] = ..., states: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RawDynamicMapState(_message.Message):
    __slots__ = ("lane_states",)
    LANE_STATES_FIELD_NUMBER: _ClassVar[int]
    lane_states: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, lane_states: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RawLane(_message.Message):
    __slots__ = ("type", "polyline")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    POLYLINE_FIELD_NUMBER: _ClassVar[int]
    type: int
    polyline: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, type: _Optional[int] = ..., polyline: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RawMapFeature(_message.Message):
    __slots__ = ("id", "lane", "road_line", "road_edge", "stop_sign", "crosswalk", "speed_bump", "driveway")
    ID_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    ROAD_LINE_FIELD_NUMBER: _ClassVar[int]
    ROAD_EDGE_FIELD_NUMBER: _ClassVar[int]
    STOP_SIGN_FIELD_NUMBER: _ClassVar[int]
    CROSSWALK_FIELD_NUMBER: _ClassVar[int]
    SPEED_BUMP_FIELD_NUMBER: _ClassVar[int]
    DRIVEWAY_FIELD_NUMBER: _ClassVar[int]
    id: int
    lane: bytes
    road_line: bytes
    road_edge: bytes
    stop_sign: bytes
    crosswalk: bytes
    speed_bump: bytes
    driveway: bytes
    def __init__(self, id: _Optional[int] = ..., lane: _Optional[bytes] = ..., road_line: _Optional[bytes] = ..., road_edge: _Optional[bytes] = ..., stop_sign: _Optional[bytes] = ..., crosswalk: _Optional[bytes] = ..., speed_bump: _Optional[bytes] = ..., driveway: _Optional[bytes] = ...) -> None: ...

class RawScenario(_message.Message):
    __slots__ = ("timestamps_seconds", "tracks", "objects_of_interest", "scenario_id", "sdc_track_index", "dynamic_map_states", "map_features", "current_time_index", "tracks_to_predict")
    TIMESTAMPS_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRACKS_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_OF_INTEREST_FIELD_NUMBER: _ClassVar[int]
    SCENARIO_ID_FIELD_NUMBER: _ClassVar[int]
    SDC_TRACK_INDEX_FIELD_NUMBER: _ClassVar[int]
    DYNAMIC_MAP_STATES_FIELD_NUMBER: _ClassVar[int]
    MAP_FEATURES_FIELD_NUMBER: _ClassVar[int]
    CURRENT_TIME_INDEX_FIELD_NUMBER: _ClassVar[int]
    TRACKS_TO_PREDICT_FIELD_NUMBER: _ClassVar[int]
    timestamps_seconds: _containers.RepeatedScalarFieldContainer[float]
    tracks: _containers.RepeatedCompositeFieldContainer[RawTrack]
    objects_of_interest: _containers.RepeatedScalarFieldContainer[int]
    scenario_id: bytes
    sdc_track_index: int
    dynamic_map_states: _containers.RepeatedCompositeFieldContainer[RawDynamicMapState]
    map_features: _containers.RepeatedCompositeFieldContainer[RawMapFeature]
    current_time_index: int
    tracks_to_predict: _containers.RepeatedCompositeFieldContainer[_scenario_pb2.RequiredPrediction]
    def __init__(self, timestamps_seconds: _Optional[_Iterable[float]] = ..., tracks: _Optional[_Iterable[_Union[RawTrack, _Mapping]]] = ..., objects_of_interest: _Optional[_Iterable[int]] = ..., scenario_id: _Optional[bytes] = ..., sdc_track_index: _Optional[int] = ..., dynamic_map_states: _Optional[_Iterable[_Union[RawDynamicMapState, _Mapping]]] = ..., map_features: _Optional[_Iterable[_Union[RawMapFeature, _Mapping]]] = ..., current_time_index: _Optional[int] = ..., tracks_to_predict: _Optional[_Iterable[_Union[_scenario_pb2.RequiredPrediction, _Mapping]]] = ...) -> None: ...

"""What datamodules hand to tasks: one NamedTuple a kind of task."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from datamodules.scene import Scene


class ImageBatch(NamedTuple):
    """Images with one class each.

    Attributes:
        images: normalised colour images, float32, shape (B, 3, H, W).
        targets: class indices, int64, shape (B,); or class weights, float32, shape (B, classes), where images are mixed.
    """

    images: Tensor
    targets: Tensor


class Boxes(NamedTuple):
    """Objects of one image.

    Attributes:
        boxes: (n, 4) float32 x1, y1, x2, y2 in pixels of the image as the batch has it; n may be 0.
        labels: (n,) int64, 0 … classes − 1 in the order of the data set's `class_names`.
        areas: (n,) float32: pixels of the object in the image as its file has it, which tells small from large.
        crowd: (n,) bool: a group too dense to part (COCO's iscrowd); never in training batches.
        image_id: the data set's id of the image.
        original: height and width of the image as its file has it, pixels.
    """

    boxes: Tensor
    labels: Tensor
    areas: Tensor
    crowd: Tensor
    image_id: int
    original: tuple[int, int]


class DetectionBatch(NamedTuple):
    """Images with boxes, each padded at the right and below with zeros to the largest of the batch.

    Attributes:
        images: normalised colour images, float32, shape (B, 3, H, W).
        sizes: height and width of each image inside its padding, int64, shape (B, 2).
        targets: B of them.
    """

    images: Tensor
    sizes: Tensor
    targets: tuple[Boxes, ...]


class SegmentationBatch(NamedTuple):
    """Images with a class for every pixel, each padded at the right and below to the largest of the batch.

    Attributes:
        images: normalised colour images, float32, shape (B, 3, H, W), padded with zeros.
        sizes: height and width of each image inside its padding, int64, shape (B, 2).
        targets: class of each pixel, int64, shape (B, H', W'); 255 where it isn't told, and in the padding. In training
            (H', W') is (H, W); in evaluation it is the size that the files have.
        target_sizes: height and width of each target inside its padding, int64, shape (B, 2).
        image_ids: the file names of the images, without folder and ending.
    """

    images: Tensor
    sizes: Tensor
    targets: Tensor
    target_sizes: Tensor
    image_ids: tuple[str, ...]


class SceneBatch(NamedTuple):
    """Traffic scenes, padded to b scenes of a agents over t steps of 0.1 s and m map pieces, each in a frame of its own.

    Agents are those valid at the current step (index 10), padding last. What isn't valid is zero, so that no NaN can
    travel; padding never changes valid outputs.

    Attributes:
        agent_pose: (b, a, t, 3) float32: x, y in metres and heading in radians, in the frame of the scene. Headings are
            as the file has them, not wrapped.
        agent_velocity: (b, a, t, 2) float32 metres a second, in the frame of the scene.
        agent_valid: (b, a, t) bool.
        agent_height: (b, a) float32 metres, z at the current step in the scene's coordinates.
        agent_size: (b, a, 3) float32: length, width, height at the current step.
        agent_type: (b, a) int64: 0 vehicle, 1 pedestrian, 2 cyclist; agents of unknown or other type count as vehicles.
        agent_trains: (b, a) bool, whether the loss counts the agent.
        agent_index: (b, a) int64 index of the agent in its scene, −1 where padded.
        map_pose: (b, m, 3) float32: where a piece starts and the heading it starts with.
        map_points: (b, m, 2, 2) float32: middle and end of a piece in its own frame (x along its heading).
        map_type: (b, m) int64 `MapPieceType`.
        map_light: (b, m) int64 `LightState` of the lane at the current step, 0 where there is none.
        map_valid: (b, m) bool.
        frame: (b, 3) float64: x, y and heading of the frame in the coordinates of the scene; a point is
            rotate(p, heading) + (x, y).
        scenes: the scenes themselves, b of them, uncut, for metrics and pictures.
    """

    agent_pose: Tensor
    agent_velocity: Tensor
    agent_valid: Tensor
    agent_height: Tensor
    agent_size: Tensor
    agent_type: Tensor
    agent_trains: Tensor
    agent_index: Tensor
    map_pose: Tensor
    map_points: Tensor
    map_type: Tensor
    map_light: Tensor
    map_valid: Tensor
    frame: Tensor
    scenes: tuple[Scene, ...]


class TokenBatch(NamedTuple):
    """b rows of text, t tokens each.

    Attributes:
        tokens: (b, t) int64.
        targets: (b, t) int64: the token that follows, −100 where none is to be told (after a document's last token, say).
        position: (b, t) int64: tokens since the document began, or since the row's strand or window did where that was
            later.
        bytes: (b, t) int64: bytes of text that the target stands for, 0 where it is ignored.
        fresh: (b,) bool: rows that begin anew; the others go on from where the batch before ended.
        depth: (b,) float32: where in the text the answer lies, 0 … 1; NaN where that means nothing.
        references: b tuples of answers to look for in what the model writes after the prompt, or () where none are.
            The prompt then ends at the first target, in the same column in all rows.
    """

    tokens: Tensor
    targets: Tensor
    position: Tensor
    bytes: Tensor
    fresh: Tensor
    depth: Tensor
    references: tuple[tuple[str, ...], ...] = ()

"""RT-DETR v2 (arXiv 2304.08069, 2407.17140) with transformers' layers on any backbone of ours.

Of the maintained real-time DETRs it is the plainest: D-FINE (arXiv 2410.13842) adds distributions of edges and their
distillation, which pay after long training only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from models.dense import Backbone, Boxes, Detections, valid_pixels, whole_cells
from models.detr_encoder import encode
from models.detr_losses import (
    LossWeights,
    MatchCosts,
    Objects,
    Terms,
    match,
    match_noised,
    mean_count,
    terms,
    to_centres,
    to_corners,
)

try:
    from transformers import RTDetrV2Config
    from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import (
        RTDetrV2Decoder,
        RTDetrV2HybridEncoder,
        RTDetrV2MLPPredictionHead,
        RTDetrV2MultiscaleDeformableAttention,
        get_contrastive_denoising_training_group,
    )
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"RTDetr needs {missing.name}: pip install -c constraints.txt -e '.[coco]'", name=missing.name
    ) from missing

_ABSENT = -100.0  # logit of a query that stands for no place in the image: its chance and its loss are 0


class Predictions(NamedTuple):
    """What layers say: logits (l, b, q, classes), boxes (l, b, q, 4) as parts of each image, centre and size; float32."""

    logits: Tensor
    boxes: Tensor


class Answers(NamedTuple):
    """What a batch of b images evokes.

    Attributes:
        found: of the proposals, then of every decoder layer.
        real: (b, q) bool; False where an image is so small that it has fewer cells than there are queries.
        noised: of the noised objects, by every decoder layer; None where there are none.
        places: b of (groups · n,) int64: which noised queries should find their object.
        groups: how often each object was noised.
    """

    found: Predictions
    real: Tensor
    noised: Predictions | None = None
    places: Sequence[Tensor] = ()
    groups: int = 0


def _logit(share: Tensor) -> Tensor:
    return torch.logit(share, eps=1e-5)


class RTDetr(nn.Module):
    """A detector without compiled operators: hybrid encoder, queries chosen from it, deformable decoder.

    Names of parameters are those of transformers' `RTDetrV2Model`, so its head loads as it is. Boxes and anchors are
    told in parts of each image without its padding, and padding is masked everywhere, so that in evaluation an image
    is answered the same alone and in a batch. In training the batch norms of the head still count padded cells.

    Args:
        backbone: gives maps whose strides double from each to the next.
        num_classes: of objects.
        width: channels of the head, a multiple of 4 and of `heads`.
        queries: boxes an image is answered with.
        decoder_layers, heads, points: of the decoder; points sampled from each map by each head.
        feed_forward: hidden units of the transformer layers.
        encoder_layers: self-attention on the coarsest map; 0 for convolutions alone.
        expansion: inner width of the convolution blocks, as a part of `width`.
        denoising: noised objects shown beside the queries in training, about so many of each image; 0 for none.
        label_noise: share of the noised objects that may get a wrong label.
        box_noise: how far a noised box is off, in halves of its size.
        anchor: side of the finest map's anchors as a part of the image; it doubles from each map to the next.
        prior: chance of every class at first.
        detections: most boxes told of an image.
        matchability: gamma of the matchability-aware loss in the varifocal's place, as `models.detr_losses.terms`.
        costs, weights: of matching and losses.

    Raises:
        ValueError: an argument doesn't suit another or the backbone; targets have a label that isn't a class.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        width: int = 256,
        queries: int = 300,
        decoder_layers: int = 6,
        heads: int = 8,
        points: int = 4,
        feed_forward: int = 1024,
        encoder_layers: int = 1,
        expansion: float = 1.0,
        denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        anchor: float = 0.05,
        prior: float = 0.01,
        detections: int = 100,
        matchability: float | None = None,
        costs: MatchCosts | None = None,
        weights: LossWeights | None = None,
    ) -> None:
        super().__init__()
        strides, levels = tuple(backbone.strides), len(backbone.strides)
        if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
            raise ValueError(f"RTDetr fuses maps whose strides double, the backbone's are {strides}")
        if width % 4 or width % heads:
            raise ValueError(f"width={width} isn't a multiple of 4 and of heads={heads}")
        if denoising and box_noise <= 0:
            raise ValueError(f"box_noise={box_noise} should be above 0; denoising=0 turns noised objects off")
        self.backbone, self.num_classes, self.strides = backbone, num_classes, strides
        self.queries, self.detections, self.anchor = queries, detections, anchor
        self.denoising, self.label_noise, self.box_noise = denoising, label_noise, box_noise
        self.matchability = matchability
        self.costs, self.weights = costs or MatchCosts(), weights or LossWeights()
        config = RTDetrV2Config(
            num_labels=num_classes,  # type: ignore[call-arg]  # a key of all configurations, not in the signature
            encoder_hidden_dim=width,
            encoder_in_channels=list(backbone.channels),
            feat_strides=list(strides),
            encoder_layers=encoder_layers,
            encoder_ffn_dim=feed_forward,
            encoder_attention_heads=heads,
            encode_proj_layers=[levels - 1],
            hidden_expansion=expansion,
            d_model=width,
            num_queries=queries,
            decoder_in_channels=[width] * levels,
            decoder_ffn_dim=feed_forward,
            num_feature_levels=levels,
            decoder_n_points=points,
            decoder_layers=decoder_layers,
            decoder_attention_heads=heads,
            decoder_n_levels=levels,
        )

        def projection(channels: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(channels, width, kernel_size=1, bias=False), nn.BatchNorm2d(width))

        def boxes() -> RTDetrV2MLPPredictionHead:
            return RTDetrV2MLPPredictionHead(width, width, 4, num_layers=3)

        self.encoder_input_proj = nn.ModuleList(projection(channels) for channels in backbone.channels)
        self.encoder: Any = RTDetrV2HybridEncoder(config)
        self.decoder_input_proj = nn.ModuleList(projection(width) for _ in range(levels))
        if denoising:
            self.denoising_class_embed = nn.Embedding(num_classes + 1, width, padding_idx=num_classes)
        self.enc_output = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.enc_score_head = nn.Linear(width, num_classes)
        self.enc_bbox_head = boxes()
        self.decoder: Any = RTDetrV2Decoder(config)
        class_heads: Any = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(decoder_layers))
        box_heads: Any = nn.ModuleList(boxes() for _ in range(decoder_layers))
        self.decoder.class_embed, self.decoder.bbox_embed = class_heads, box_heads
        self._initialise(prior)

    @torch.no_grad()
    def _initialise(self, prior: float) -> None:
        # transformers draws batch norm scales and linear weights around 0 (its models start from trained ones)
        for name, part in self.named_children():
            for module in part.modules() if name != "backbone" else ():
                if isinstance(module, nn.BatchNorm2d | nn.Conv2d):
                    module.reset_parameters()
                elif isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.xavier_uniform_(module.weight)
        for module in self.decoder.modules():
            if isinstance(module, RTDetrV2MultiscaleDeformableAttention):
                nn.init.zeros_(module.sampling_offsets.weight)  # their biases point away from the middle already
                nn.init.zeros_(module.attention_weights.weight)
        for head in (self.enc_bbox_head, *self.decoder.bbox_embed):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        for head in (self.enc_score_head, *self.decoder.class_embed):
            nn.init.constant_(head.bias, torch.logit(torch.tensor(prior)).item())
        if self.denoising:
            nn.init.zeros_(self.denoising_class_embed.weight[self.num_classes])

    def no_weight_decay(self) -> set[str]:
        """What predicts, points or is looked up: no decay, and with Muon no orthogonal updates."""
        ends = ("sampling_offsets.weight", "attention_weights.weight", "layers.2.weight", "score_head.weight")
        return {
            name
            for name, _ in self.named_parameters()
            if not name.startswith("backbone.")
            and ("class_embed" in name or name.endswith(ends))
            and name.endswith("weight")
        }

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Boxes] | None = None
    ) -> Mapping[str, Tensor] | list[Detections]:
        """Losses where targets are given, else what is found.

        Args:
            images: (b, 3, H, W), each padded at the right and below.
            sizes: (b, 2) int64, height and width of each image inside its padding.
            targets: objects of each image, boxes in pixels.

        Returns:
            Weighted scalars "classes", "l1", "giou" (proposals and all decoder layers) and "denoising" (0 in
            evaluation); or b `Detections`.
        """
        if targets is None:
            return self._detections(self.answer(images, sizes), sizes)
        scale = sizes.flip(1).repeat(1, 2).float()  # (b, 4) width, height, width, height
        objects = [
            Objects(to_centres(target.boxes.float() / size), target.labels)
            for target, size in zip(targets, scale, strict=True)
        ]
        labels = torch.cat([target.labels for target in targets])
        if ((labels < 0) | (labels >= self.num_classes)).any():
            raise ValueError(
                f"targets have labels {labels.unique().tolist()}, the classes are 0 … {self.num_classes - 1}"
            )
        return self._losses(self.answer(images, sizes, objects), objects)

    def answer(self, images: Tensor, sizes: Tensor, objects: Sequence[Objects] | None = None) -> Answers:
        """All that the layers say about images; objects are noised and shown where given, in training."""
        images, _ = whole_cells(images, self.strides[-1])
        padded = bool((sizes != sizes.new_tensor(images.shape[-2:])).any())
        maps = self.backbone(images, valid_pixels(sizes, *images.shape[-2:]) if padded else None)
        cells = [
            valid_pixels(-(-sizes // stride), *features.shape[-2:])[:, None]  # (b, 1, h, w)
            for stride, features in zip(self.strides, maps, strict=True)
        ]
        maps = [project(x) * mask for project, x, mask in zip(self.encoder_input_proj, maps, cells, strict=True)]
        maps = encode(self.encoder, maps, cells)
        maps = [project(x) * mask for project, x, mask in zip(self.decoder_input_proj, maps, cells, strict=True)]
        memory = torch.cat([features.flatten(2).transpose(1, 2) for features in maps], dim=1)  # (b, n, c)
        valid = torch.cat([mask.flatten(1) for mask in cells], dim=1)  # (b, n)
        shapes = [(features.shape[2], features.shape[3]) for features in maps]
        queries, logits, boxes, real = self._propose(memory, valid, shapes, sizes)
        place, mask, noise = boxes.detach(), ~real[:, None, None], None
        if objects is not None and self.denoising and self.training:
            known, noised, apart, noise = get_contrastive_denoising_training_group(
                [{"class_labels": labels, "boxes": boxes} for boxes, labels in objects],
                self.num_classes,
                queries.shape[1],
                self.denoising_class_embed,
                self.denoising,
                self.label_noise,
                self.box_noise,
            )
        if noise is not None:  # None where no image has objects
            queries, place = torch.cat((known, queries), dim=1), torch.cat((noised.sigmoid(), place), dim=1)
            mask = pad(mask, (known.shape[1], 0)) | (apart < 0)
        share = sizes.flip(1) / sizes.new_tensor([images.shape[-1], images.shape[-2]])  # (b, 2) of the padded image
        away = torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -torch.inf)
        said = self._decode(queries, place, memory, valid, shapes, share.repeat(1, 2)[:, None], away)
        shown = 0 if noise is None else known.shape[1]
        found = Predictions(
            torch.cat((logits[None], said.logits[:, :, shown:])).masked_fill(~real[..., None], _ABSENT),
            torch.cat((boxes[None], said.boxes[:, :, shown:])),
        )
        if noise is None:
            return Answers(found, real)
        noised = Predictions(said.logits[:, :, :shown], said.boxes[:, :, :shown])
        return Answers(found, real, noised, noise["dn_positive_idx"], noise["dn_num_group"])

    def _anchors(self, shapes: Sequence[tuple[int, int]], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n, 4) logits of a box around every cell, as parts of each image; (b, n) bool, which of them are usable."""
        levels = []
        for level, ((height, width), stride) in enumerate(zip(shapes, self.strides, strict=True)):
            y, x = (stride * (torch.arange(cells, device=sizes.device) + 0.5) for cells in (height, width))
            y, x = y / sizes[:, :1], x / sizes[:, 1:]  # (b, height), (b, width)
            centres = torch.stack((x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1)
            sides = torch.full_like(centres, self.anchor * 2**level)
            levels.append(torch.cat((centres, sides), dim=-1).flatten(1, 2))
        anchors = torch.cat(levels, dim=1)
        return torch.logit(anchors, eps=0.01), ((anchors > 0.01) & (anchors < 0.99)).all(-1)

    def _propose(
        self, memory: Tensor, valid: Tensor, shapes: Sequence[tuple[int, int]], sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features (b, q, c), logits (b, q, classes) and boxes (b, q, 4) of the best cells; which of them are usable."""
        anchors, usable = self._anchors(shapes, sizes)
        usable &= valid
        features = self.enc_output(memory * usable[..., None])
        logits = self.enc_score_head(features).float()
        scores = logits.detach().amax(-1).masked_fill(~usable, -torch.inf)
        best = scores.topk(min(self.queries, scores.shape[1])).indices

        def pick(of_cells: Tensor) -> Tensor:
            return of_cells.gather(1, best[..., None].expand(-1, -1, of_cells.shape[-1]))

        chosen = pick(features)
        boxes = (self.enc_bbox_head(chosen).float() + pick(anchors)).sigmoid()
        return chosen.detach(), pick(logits), boxes, usable.gather(1, best)

    def _decode(
        self,
        queries: Tensor,
        boxes: Tensor,
        memory: Tensor,
        valid: Tensor,
        shapes: list[tuple[int, int]],
        share: Tensor,
        away: Tensor,
    ) -> Predictions:
        # transformers' decoder; boxes stay float32 under autocast, and are parts of the image rather than of the batch
        spatial = torch.tensor(shapes, device=memory.device)
        logits, refined = [], []
        for layer, tell_class, tell_box in zip(
            self.decoder.layers, self.decoder.class_embed, self.decoder.bbox_embed, strict=True
        ):
            place = self.decoder.query_pos_head(boxes)
            attended, _ = layer.self_attn(queries, attention_mask=away, position_embeddings=place)
            queries = layer.self_attn_layer_norm(queries + attended)
            looked, _ = layer.encoder_attn(
                queries,
                attention_mask=valid,
                encoder_hidden_states=memory,
                position_embeddings=place,
                reference_points=(boxes * share)[:, :, None],
                spatial_shapes=spatial,
                spatial_shapes_list=shapes,
            )
            queries = layer.encoder_attn_layer_norm(queries + looked)
            queries = layer.final_layer_norm(queries + layer.mlp(queries))
            logits.append(tell_class(queries).float())
            refined.append((tell_box(queries).float() + _logit(boxes)).sigmoid())
            boxes = refined[-1].detach()
        return Predictions(torch.stack(logits), torch.stack(refined))

    def _losses(self, answers: Answers, objects: Sequence[Objects]) -> dict[str, Tensor]:
        found, noised = answers.found, answers.noised
        count = mean_count(objects, found.logits.device)
        with torch.autocast(found.logits.device.type, enabled=False):
            matches = match(found.logits, found.boxes, objects, self.costs)
            parts = self._weighted(terms(found.logits, found.boxes, matches, objects, count, self.matchability))
            parts["denoising"] = count.new_zeros(())
            if noised is not None:
                matches = match_noised(answers.places, answers.groups, objects, len(noised.logits))
                learned = terms(*noised, matches, objects, count * answers.groups, self.matchability)
                parts["denoising"] = self.weights.denoising * torch.stack(list(self._weighted(learned).values())).sum()
            elif self.denoising:  # a batch without objects: every parameter has a gradient all the same
                parts["denoising"] = 0 * self.denoising_class_embed.weight.sum()
        return parts

    def _weighted(self, sums: Terms) -> dict[str, Tensor]:
        return {name: getattr(self.weights, name) * value for name, value in sums._asdict().items()}

    def _detections(self, answers: Answers, sizes: Tensor) -> list[Detections]:
        scores = answers.found.logits[-1].sigmoid()  # (b, q, classes)
        scores = scores.masked_fill(~answers.real[..., None], -1).flatten(1)
        best, index = scores.topk(min(self.detections, scores.shape[1]))
        scale = sizes.flip(1).repeat(1, 2)[:, None]
        boxes = (to_corners(answers.found.boxes[-1]) * scale).clamp(min=0).minimum(scale)
        query, labels = index // self.num_classes, index % self.num_classes
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        return [
            Detections(box[score >= 0], score[score >= 0], label[score >= 0])
            for box, score, label in zip(boxes, best, labels, strict=True)
        ]

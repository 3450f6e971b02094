"""mmdet's DINO on our backbones: its own configuration is the oracle, and its CUDA route is walked on a CPU."""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from models import mmdet_bridge
from models.dense import valid_pixels
from models.mmdet_bridge import MMDetDino, RotalithBackbone
from models.pyramids import SimplePyramid
from models.vit import mixed
from models.windowed_vit import WindowedViT

with_mmdet = pytest.mark.skipif(
    importlib.util.find_spec("mmdet") is None, reason="no mmdet: pip install -c constraints.txt -e '.[mmdet]'"
)
TRUNK = {
    "rotary": mixed, "img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "window": 4,
    "global_blocks": (1,), "init_values": None, "init_std": 0.2,
}  # fmt: skip


class Objectlist(NamedTuple):
    boxes: torch.Tensor
    labels: torch.Tensor


def pyramid():
    return SimplePyramid(WindowedViT(**TRUNK), channels=16, strides=(8, 16, 32))


def small(backbone=None, **changes):
    settings = {
        "queries": 30,
        "denoising": 8,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "channels": 32,
        "feedforward": 48,
    }
    return MMDetDino(backbone or pyramid(), 5, **{**settings, **changes})


def batch(*counts, size=(128, 160)):
    height, width = size
    sizes = torch.tensor([(height - 32 * at, width - 16 * at) for at in range(len(counts))])
    images = torch.randn(len(counts), 3, height, width) * valid_pixels(sizes, height, width)[:, None]
    targets = []
    for count, (high, wide) in zip(counts, sizes.tolist(), strict=True):
        corner = torch.rand(count, 2) * torch.tensor([wide, high]) * 0.6
        boxes = torch.cat((corner, corner + torch.tensor([wide, high]) * 0.3), dim=1)
        targets.append(Objectlist(boxes, torch.randint(5, (count,))))
    return images, sizes, targets


def test_nothing_is_imported_before_use():
    code = "import sys, models.mmdet_bridge; print({'mmdet', 'mmcv', 'mmengine', 'torchvision'} & {*sys.modules})"
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert said.stdout == "set()\n"


@pytest.mark.parametrize("missing", ["mmcv", "mmdet.models"])
def test_a_missing_extra_is_answered_with_the_command(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "mmcv._ext", sys.modules.get("mmcv._ext"))
    monkeypatch.setitem(sys.modules, missing, None)
    if missing != "mmcv":
        pytest.importorskip("mmcv")
    with pytest.raises(ModuleNotFoundError, match=rf"need {missing}: pip install -c constraints.txt -e '\.\[mmdet\]'"):
        small()


def test_a_missing_system_library_is_answered_with_the_command(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "mmcv":
                raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.delitem(sys.modules, "mmcv", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"libGL.so.1.*apt install libgl1.*opencv-python-headless"):
        small()


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [({"channels": 48}, "channels=48"), ({"levels": 2}, "levels=2"), ({"denoising": 0}, "denoising=0")],
    ids=["channels", "levels", "denoising"],
)
def test_arguments_out_of_bounds_are_named(changes, culprit):
    with pytest.raises(ValueError, match=culprit):
        small(**changes)


def test_a_type_that_cannot_be_imported_is_named():
    with pytest.raises(ValueError, match=r"models\.pyramids\.NoPyramid"):
        RotalithBackbone({"type": "models.pyramids.NoPyramid"})


@with_mmdet
class TestWithMMDet:
    def test_a_step_reaches_every_parameter(self):
        model = small()
        losses = model(*batch(3, 1))
        assert set(losses) == {"class", "l1", "giou", "proposals", "denoising"}
        assert all(loss.shape == () and loss > 0 for loss in losses.values())
        sum(losses.values()).backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        slopes = [p.grad.norm() for n, p in model.named_parameters() if "freqs" in n or "frequencies" in n]
        assert slopes
        assert all(slope > 0 for slope in slopes)

    def test_images_without_objects_train(self):
        model = small()
        losses = model(*batch(0, 0))
        assert losses["class"] > 0
        assert losses["l1"] == losses["giou"] == losses["denoising"] == 0
        sum(losses.values()).backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert torch.isfinite(sum(model(*batch(2, 0)).values()))

    def test_detections_lie_in_their_images_best_first(self):
        images, sizes, _ = batch(0, 0)
        with torch.no_grad():
            found = small(max_detections=40).eval()(images, sizes)
        for image, (height, width) in zip(found, sizes.tolist(), strict=True):
            assert image.boxes.shape == (40, 4)
            assert image.scores.shape == image.labels.shape == (40,)
            assert image.boxes.dtype == image.scores.dtype == torch.float32
            assert image.labels.dtype == torch.int64
            assert image.boxes.min() >= 0
            assert (image.boxes <= torch.tensor([width, height] * 2)).all()
            assert (image.boxes[:, :2] <= image.boxes[:, 2:]).all()
            assert (image.scores.diff() <= 0).all()
            assert image.scores.min() >= 0
            assert image.scores.max() <= 1
            assert image.labels.min() >= 0
            assert image.labels.max() < 5

    def test_fewer_answers_than_detections(self):
        images, sizes, _ = batch(0)
        with torch.no_grad():
            assert len(small(queries=7).eval()(images, sizes)[0].boxes) == 35  # every class of every query

    def test_the_backbone_sees_the_padding(self):
        class Watched(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.seen = pyramid(), []
                self.strides, self.channels = self.inner.strides, self.inner.channels

            def forward(self, images, valid=None):
                self.seen.append(valid)
                return self.inner(images, valid)

        model = small(Watched()).eval()
        images, sizes, _ = batch(0, 0)
        with torch.no_grad():
            model(images, sizes)
            model(images, torch.tensor([[128, 160]] * 2))
        assert torch.equal(model.backbone.seen[0], valid_pixels(sizes, 128, 160))
        assert model.backbone.seen[1] is None

    def test_under_autocast_the_head_stays_exact(self):
        class Kept(nn.Module):
            """A backbone that autocast can't touch, so that whatever changes is the head's."""

            strides, channels = (8, 16), (3, 3)

            def forward(self, images, valid=None):
                return [nn.functional.avg_pool2d(images, stride) for stride in self.strides]

        model = small(Kept())
        arguments = batch(2, 1)
        torch.manual_seed(1)
        expected = model(*arguments)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(*arguments)
        assert all(torch.equal(found[name], loss) for name, loss in expected.items())

    def test_weights_are_stored_once_and_come_back(self):
        model, other = small(), small()
        weights = model.state_dict()
        assert len({value.data_ptr() for value in weights.values()}) == len(weights)
        assert {name.split(".")[0] for name in weights} == {"backbone", "detector"}
        other.load_state_dict(weights)
        images, sizes, _ = batch(0, 0)
        with torch.no_grad():
            pairs = zip(model.eval()(images, sizes), other.eval()(images, sizes), strict=True)
        assert all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))

    def test_the_backbone_keeps_its_weights(self):
        backbone = pyramid()
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        small(backbone)
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())

    def test_no_noise_and_no_global_state(self, capfd):
        from mmengine.registry import DefaultScope

        mmdet_bridge.register()
        disabled, scope = logging.root.manager.disable, DefaultScope.get_current_instance()
        capfd.readouterr()
        small()
        assert capfd.readouterr() == ("", "")
        assert logging.root.manager.disable == disabled
        assert DefaultScope.get_current_instance() is scope

    def test_more_queries_than_cells_are_refused(self):
        images, sizes, _ = batch(0, size=(32, 32))
        with pytest.raises(ValueError, match=r"queries=30 .* 22 cells of 32×32"):  # 16 + 4 + 1 + 1
            small().eval()(images, sizes)

    def test_a_label_that_is_no_class_is_named(self):
        images, sizes, targets = batch(2)
        targets[0].labels[0] = 5
        with pytest.raises(ValueError, match="0 … 4"):
            small()(images, sizes, targets)

    def test_targets_in_evaluation_are_refused(self):
        with pytest.raises(ValueError, match="training alone"):
            small().eval()(*batch(2))

    def test_the_route_on_cuda_without_compiled_operators(self, monkeypatch):
        """Tensors that say they are on CUDA take that branch of mmcv and mmdet; their data stay on the CPU."""
        model, arguments = small(), batch(3, 1)
        if mmdet_bridge.compiled_operators():
            pytest.skip("mmcv is compiled: its operators are for CUDA alone")
        stand_in, called = sys.modules["mmcv._ext"], []
        for name in ("ms_deform_attn_forward", "ms_deform_attn_backward", "sigmoid_focal_loss_forward"):
            operator = getattr(stand_in, name)

            def counted(*given, name=name, operator=operator, **named):
                called.append(name)
                return operator(*given, **named)

            monkeypatch.setattr(stand_in, name, counted)

        def step():
            torch.manual_seed(1)
            model.zero_grad()
            losses = model(*arguments)
            sum(losses.values()).backward()
            return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

        expected, slopes = step()
        assert not called
        monkeypatch.setattr("mmcv.ops.multi_scale_deform_attn.IS_CUDA_AVAILABLE", True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
        found, routed = step()
        assert (
            called.count("ms_deform_attn_forward") == called.count("ms_deform_attn_backward") == 1 + 2
        )  # a layer each
        assert "sigmoid_focal_loss_forward" in called
        torch.testing.assert_close(found, expected)
        # float32 sums over levels and layers in another order
        torch.testing.assert_close(routed, slopes, atol=2e-4, rtol=2e-3)

    def test_both_ways_to_deformable_attention_agree(self):
        mmdet_bridge.register()
        if mmdet_bridge.compiled_operators():
            pytest.skip("mmcv is compiled: its operators are for CUDA alone")
        shapes = torch.tensor([[6, 9], [3, 5], [2, 3]])
        inputs = [
            torch.randn(2, 54 + 15 + 6, 4, 8, dtype=torch.float64, requires_grad=True),
            (torch.rand(2, 7, 4, 3, 5, 2, dtype=torch.float64) * 1.4 - 0.2).requires_grad_(),  # beyond the edges too
            torch.rand(2, 7, 4, 3, 5, dtype=torch.float64, requires_grad=True),
        ]
        results = []
        for attention in mmdet_bridge.deformable_attentions().values():
            output = attention(inputs[0], shapes, *inputs[1:])
            results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
        torch.testing.assert_close(*results)

    def test_the_paper_configuration_of_mmdet(self):
        """mmdet's own config file, our backbone named in it: the same parts, and with the same weights the same losses."""
        import mmdet
        from mmengine.config import Config

        registry = mmdet_bridge.register()
        config = Config.fromfile(
            Path(mmdet.__file__).parent / ".mim/configs/dino/dino-4scale_r50_8xb2-12e_coco.py"
        ).model
        trunk = {"type": "models.windowed_vit.WindowedViT", **TRUNK}
        config.backbone = {
            "_delete_": True,
            "type": "RotalithBackbone",
            "network": {
                "type": "models.pyramids.SimplePyramid",
                "channels": 16,
                "strides": [8, 16, 32],
                "trunk": trunk,
            },
        }
        config.neck.in_channels = [16, 16, 16]
        config.data_preprocessor = None  # our images are normalised already
        config.num_queries = 40  # for images this small; ours by default 900
        del config.backbone["_delete_"]
        theirs = registry.MODELS.build(config)
        ours = MMDetDino(pyramid(), 80, queries=40)
        for part in ("neck", "encoder", "decoder", "bbox_head", "positional_encoding", "dn_query_generator"):
            assert str(getattr(ours.detector, part)) == str(getattr(theirs, part)), part
        plain = (bool, int, float, str)
        for name, module in theirs.named_modules():
            if not name.startswith("backbone"):
                mine = ours.detector.get_submodule(name)
                for key, value in vars(module).items():
                    if isinstance(value, plain) and key not in ("_is_init", "training"):
                        assert vars(mine)[key] == value, (name, key)
        costs = [(type(cost), vars(cost)) for cost in ours.detector.bbox_head.assigner.match_costs]
        assert costs == [(type(cost), vars(cost)) for cost in theirs.bbox_head.assigner.match_costs]
        theirs.load_state_dict(
            {
                f"backbone.network.{name.removeprefix('backbone.')}"
                if name.startswith("backbone.")
                else name[9:]: value
                for name, value in ours.state_dict().items()
            }
        )
        images, sizes, targets = batch(2, size=(96, 96))
        samples = ours._samples([(96, 96)], (96, 96), targets)
        torch.manual_seed(1)
        expected = sum(value.sum() for value in theirs.train().loss(images, samples).values())
        torch.manual_seed(1)
        torch.testing.assert_close(sum(ours(images, sizes, targets).values()), expected)

    @pytest.mark.slow
    def test_the_loss_falls(self):
        model, arguments = small(), batch(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        history = []
        for _ in range(20):
            loss = sum(model(*arguments).values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            history.append(loss.item())
        # three seeds gave 0.71 … 0.75; noise is drawn anew every step
        assert sum(history[-3:]) < 0.85 * sum(history[:3]), history

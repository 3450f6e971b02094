"""Checkpoints of others, made up from their key lists, come in strictly; ours go out and come back bit for bit."""

from __future__ import annotations

import argparse
import re
import sys
from collections import OrderedDict

import pytest
import torch

import compat  # noqa: F401

# isort: split
import timm
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import interpolate

import models.swin
import models.vit
from models.convert import export, load_backbone, load_checkpoint, main, read
from models.pyramids import SimplePyramid, TapPyramid
from models.rt_detr import RTDetr
from models.swin_stages import SwinStages
from models.tables import resize_table
from models.uper_net import UperNet
from models.windowed_vit import WindowedViT

VIT = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN = {"img_size": 128, "embed_dim": 16, "depths": (1, 2, 1), "num_heads": (2, 2, 4), "num_classes": 5}


def vit(name="rope_mixed_vit_small", **others):
    return timm.create_model(f"{name}_patch16_224", **{**VIT, **others}).eval()


def swin(name="swin_rope_mixed_tiny", **others):
    return timm.create_model(f"{name}_patch4_window7_224", **{**SWIN, **others}).eval()


def naver_vit(model):
    """What naver-ai's training would have stored of these weights."""
    state = dict(model.state_dict())
    freqs = state.pop("rope.freqs", None)
    if freqs is not None:
        side = torch.arange(16.0)
        state |= {"freqs": freqs.flatten(2), "freqs_t_x": side % 4, "freqs_t_y": side // 4}
    return state


def reference_swin(model):
    """What Microsoft's or naver-ai's training would have stored of these weights: merging closes a stage."""
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^layers\.(\d)\.downsample", lambda at: f"layers.{int(at[1]) - 1}.downsample", key)
        state[key.replace("head.fc.", "head.")] = value
    for name, module in model.named_modules():
        if name.endswith(".attn"):
            n = module.window_size[0] * module.window_size[1]
            state[f"{name}.relative_position_index"] = torch.zeros(n, n, dtype=torch.int64)
            state[f"{name}.rope_t_x"] = state[f"{name}.rope_t_y"] = torch.zeros(n)
            state[f"{name.removesuffix('attn')}attn_mask"] = torch.zeros(4, n, n)
    return state


def assert_equal(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


class TestSources:
    @pytest.mark.parametrize("kind", ["rope_axial", "rope_mixed", "rope_axial_ape", "rope_mixed_ape"])
    def test_naver_vit(self, tmp_path, kind):
        written, model = vit(f"{kind}_vit_small"), vit(f"{kind}_vit_small")
        options = argparse.Namespace(lr=4e-3)
        torch.save({"model": naver_vit(written), "epoch": 399, "args": options}, tmp_path / "last.pth")
        loaded = load_checkpoint(model, tmp_path / "last.pth")
        assert_equal(model, written)
        assert ("naver-ai ViT" in loaded.source) == ("mixed" in kind)

    def test_naver_vit_into_timms_own(self, tmp_path):
        written, model = (timm.create_model("vit_small_patch16_rope_mixed_224", **VIT) for _ in range(2))
        torch.save({"model": naver_vit(written)}, tmp_path / "last.pth")
        load_checkpoint(model, tmp_path / "last.pth")
        assert_equal(model, written)

    def test_timm_vit_weights_give_timms_logits(self, tmp_path):
        theirs, ours = timm.create_model("vit_small_patch16_rope_mixed_224", **VIT).eval(), vit()
        for name, parameter in theirs.named_parameters():
            if "gamma" in name:
                torch.nn.init.constant_(parameter, 0.5)
        save_file(theirs.state_dict(), tmp_path / "model.safetensors")
        load_checkpoint(ours, tmp_path / "model.safetensors")
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert (ours(x) - theirs(x)).abs().max() <= 1e-5

    @pytest.mark.parametrize("kind", ["axial", "mixed", "mixed_rpb"])
    def test_naver_swin(self, tmp_path, kind):
        written, model = swin(f"swin_rope_{kind}_tiny"), swin(f"swin_rope_{kind}_tiny")
        state = reference_swin(written)
        assert "layers.0.downsample.norm.weight" in state
        assert "layers.2.downsample.norm.weight" not in state
        torch.save({"model": state, "optimizer": {"state": {}}}, tmp_path / "swin.pth")
        assert "Swin" in load_checkpoint(model, tmp_path / "swin.pth").source
        assert_equal(model, written)

    def test_microsoft_swin_into_timms(self, tmp_path):
        arguments = {**SWIN, "window_size": 4}
        written, model = (timm.create_model("swin_tiny_patch4_window7_224", **arguments) for _ in range(2))
        torch.save({"model": reference_swin(written)}, tmp_path / "swin.pth")
        load_checkpoint(model, tmp_path / "swin.pth")
        assert_equal(model, written)

    def test_options_of_a_swin_training_are_read_as_values(self, tmp_path, monkeypatch):
        config = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
        module = type(sys)("yacs.config")
        module.CfgNode = config
        monkeypatch.setitem(sys.modules, "yacs", type(sys)("yacs"))
        monkeypatch.setitem(sys.modules, "yacs.config", module)
        written, model = swin(), swin()
        torch.save({"model": reference_swin(written), "config": config(epochs=300)}, tmp_path / "swin.pth")
        monkeypatch.delitem(sys.modules, "yacs.config")
        load_checkpoint(model, tmp_path / "swin.pth")
        assert_equal(model, written)

    @pytest.mark.parametrize("compiled", ["", "_orig_mod."])
    def test_our_lightning_checkpoints(self, tmp_path, compiled):
        written, model = swin(), swin()
        state = OrderedDict((f"model.{compiled}{key}", value) for key, value in written.state_dict().items())
        state["criterion.weight"] = torch.ones(5)
        content = {"state_dict": state, "pytorch-lightning_version": "2.6.6", "hyper_parameters": {"rate": 1e-3}}
        torch.save(content, tmp_path / "last.ckpt")
        assert "Lightning" in load_checkpoint(model, tmp_path / "last.ckpt").source
        assert_equal(model, written)


class TestRoundTrip:
    @pytest.mark.parametrize("make", [vit, swin, lambda: swin("swin_rope_axial_rpb_tiny", img_size=(64, 128))])
    def test_bit_for_bit(self, tmp_path, make):
        written, model = make(), make()
        export(written, tmp_path / "deep" / "model.safetensors")
        load_checkpoint(model, tmp_path / "deep" / "model.safetensors")
        assert_equal(model, written)
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.safetensors"]

    def test_compiled_models_are_written_as_plain_ones(self, tmp_path):
        written, model = torch.compile(swin()), torch.compile(swin())
        export(written, tmp_path / "model.safetensors")
        assert "norm.weight" in read(tmp_path / "model.safetensors")[0]
        load_checkpoint(model, tmp_path / "model.safetensors")
        assert_equal(model, written)

    def test_half_precision_is_kept(self, tmp_path):
        written = swin().bfloat16()
        export(written, tmp_path / "model.safetensors")
        state, _ = read(tmp_path / "model.safetensors")
        assert all(torch.equal(value, written.state_dict()[key]) for key, value in state.items())
        assert {value.dtype for key, value in state.items() if "rope_freqs" not in key} == {torch.bfloat16}
        assert state["layers.0.blocks.0.attn.rope_freqs"].dtype == torch.float32

    def test_metadata_names_the_architecture(self, tmp_path):
        export(swin(), tmp_path / "a.safetensors")
        export(swin(), tmp_path / "b.safetensors", architecture="another")
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert file.metadata()["architecture"] == "swin_rope_mixed_tiny_patch4_window7_224"
            assert file.metadata()["rotalith_version"]
        assert read(tmp_path / "b.safetensors")[1]["architecture"] == "another"

    def test_a_failed_export_leaves_the_old_file(self, tmp_path, monkeypatch):
        export(swin(), tmp_path / "model.safetensors")
        before = (tmp_path / "model.safetensors").read_bytes()

        def fail(*_, **__):
            raise OSError("disk full")

        monkeypatch.setattr("models.convert.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            export(swin(), tmp_path / "model.safetensors")
        assert (tmp_path / "model.safetensors").read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_backbone_takes_weights_of_a_classifier(self, tmp_path):
        written = swin()
        export(written, tmp_path / "model.safetensors")
        backbone = swin(features_only=True)
        loaded = load_checkpoint(backbone, tmp_path / "model.safetensors", skip=("head.", "norm."))
        assert set(loaded.skipped) == {"head.fc.weight", "head.fc.bias", "norm.weight", "norm.bias"}
        x = torch.randn(1, 3, 128, 128)
        with torch.no_grad():
            assert torch.equal(backbone(x)[-1], written.forward_intermediates(x)[1][-1])

    def test_other_classes_keep_their_head(self, tmp_path):
        written, model = vit(), vit(num_classes=7)
        export(written, tmp_path / "model.safetensors")
        head = model.head.weight.detach().clone()
        load_checkpoint(model, tmp_path / "model.safetensors", skip=("head.",))
        assert torch.equal(model.head.weight, head)
        assert torch.equal(model.rope.freqs, written.rope.freqs)


class TestResize:
    def test_bias_tables(self, tmp_path):
        written, model = swin("swin_rope_mixed_rpb_tiny"), swin("swin_rope_mixed_rpb_tiny", img_size=192)
        torch.save({"model": reference_swin(written)}, tmp_path / "swin.pth")
        with pytest.raises(ValueError, match=r"a table of 7 × 7, the model's is 11 × 11; resize=True"):
            load_checkpoint(model, tmp_path / "swin.pth")
        loaded = load_checkpoint(model, tmp_path / "swin.pth", resize=True)
        assert len(loaded.resized) == 4
        key = "layers.1.blocks.0.attn.relative_position_bias_table"
        image = written.state_dict()[key].t().reshape(1, 2, 7, 7)
        expected = interpolate(image, size=(11, 11), mode="bicubic", align_corners=False).reshape(2, -1).t()
        assert torch.equal(model.state_dict()[key], expected)

    def test_absolute_embeddings(self, tmp_path):
        written, model = vit("rope_mixed_ape_vit_small"), vit("rope_mixed_ape_vit_small", img_size=(96, 48))
        torch.save({"model": naver_vit(written)}, tmp_path / "vit.pth")
        with pytest.raises(ValueError, match=r"pos_embed is a table of 4 × 4, the model's is 6 × 3"):
            load_checkpoint(model, tmp_path / "vit.pth")
        assert load_checkpoint(model, tmp_path / "vit.pth", resize=True).resized == ("pos_embed",)
        image = written.pos_embed.detach().transpose(1, 2).reshape(1, 32, 4, 4)
        expected = interpolate(image, size=(6, 3), mode="bicubic", align_corners=False, antialias=False)
        torch.testing.assert_close(model.pos_embed.detach(), expected.flatten(2).transpose(1, 2), atol=0, rtol=0)

    def test_equal_length_of_another_shape_is_noticed(self, tmp_path):
        square, wide = (64, 64), (32, 128)
        for there, here in ((square, wide), (wide, square)):
            written, model = (vit("rope_axial_ape_vit_small", img_size=size) for size in (there, here))
            export(written, tmp_path / "vit.safetensors")
            with pytest.raises(ValueError, match="resize=True"):
                load_checkpoint(model, tmp_path / "vit.safetensors")
            load_checkpoint(model, tmp_path / "vit.safetensors", resize=True)
            assert not torch.equal(model.pos_embed, written.pos_embed)

    def test_equal_sizes_share_the_table(self):
        table = torch.randn(25, 3)
        assert resize_table(table, (5, 5), (5, 5)) is table


class TestBackbones:
    """`load_backbone`: a classifier's weights go into the backbone of a dense model and nowhere else."""

    def trunk(self, **changes):
        arguments = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1e-4}
        return WindowedViT(rotary=models.vit.mixed, **{**arguments, "window": None, **changes})

    def dense(self, kind):
        small = {"channels": 16, "auxiliary_channels": 16}
        if kind == "pyramid of the last block":
            pyramid = SimplePyramid(self.trunk(window=2), channels=16, strides=(16, 32))
            return RTDetr(pyramid, 3, width=16, heads=2, queries=5, decoder_layers=1, feed_forward=16, denoising=2)
        if kind == "pyramid of taps":
            taps = TapPyramid(self.trunk(taps=(0, 1)), strides=(8, 16))
            return UperNet(taps, 3, auxiliary_map=1, **small)
        shape = {key: value for key, value in SWIN.items() if key not in ("img_size", "num_classes")}
        return UperNet(SwinStages(rotary=models.swin.mixed, stages=(0, 1), **shape), 3, auxiliary_map=1, **small)

    @pytest.mark.parametrize("kind", ["pyramid of the last block", "pyramid of taps", "stages"])
    @pytest.mark.parametrize("written_by", ["export", "training"])
    def test_weights_of_the_backbone_and_no_others(self, tmp_path, kind, written_by):
        model, written = self.dense(kind), swin() if kind == "stages" else vit()
        path = tmp_path / ("last.ckpt" if written_by == "training" else "model.safetensors")
        if written_by == "training":
            torch.save({"state_dict": {f"model.{key}": value for key, value in written.state_dict().items()}}, path)
        else:
            export(written, path)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        skipped = set(load_backbone(model, path).skipped)
        place = "backbone." if kind == "stages" else "backbone.trunk."
        given = {f"{place}{key}": value for key, value in written.state_dict().items() if key not in skipped}
        for key, value in model.state_dict().items():
            assert torch.equal(value, given.get(key, before[key])), key
        assert given.keys() < before.keys()
        assert {key for key in before if key.startswith(place)} - given.keys() == {
            key for key in before if key.startswith("backbone.norms.")
        }
        # what is left behind: the classifier's end, and the stages and tokens that the backbone has no use for
        assert {"norm.weight", "norm.bias"} < skipped
        left = {key.split(".")[0] for key in skipped}
        assert left == ({"norm", "head", "layers"} if kind == "stages" else {"norm", "head", "cls_token"})
        assert all(key.startswith("layers.2.") for key in skipped if key.startswith("layers."))

    def test_absolute_embeddings_are_fitted_to_the_trunk(self, tmp_path):
        written = vit("rope_mixed_ape_vit_small")
        export(written, tmp_path / "vit.safetensors")
        trunk = self.trunk(absolute=True, img_size=96)
        model = RTDetr(SimplePyramid(trunk, 16, (16, 32)), 3, width=16, heads=2)
        assert load_backbone(model, tmp_path / "vit.safetensors").resized == ("pos_embed",)
        assert torch.equal(trunk.pos_embed, resize_table(written.pos_embed, (4, 4), (6, 6)))

    def test_a_model_without_a_backbone_is_named(self, tmp_path):
        export(vit(), tmp_path / "vit.safetensors")
        with pytest.raises(ValueError, match=r"pretrained=.*vit\.safetensors: RopeViT has no backbone to load it into"):
            load_backbone(vit(), tmp_path / "vit.safetensors")

    @pytest.mark.parametrize("kind", ["pyramid of taps", "stages"])
    def test_other_networks_leave_the_model_as_it_is(self, tmp_path, kind):
        model, other = self.dense(kind), vit() if kind == "stages" else swin()
        export(other, tmp_path / "other.safetensors")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"other\.safetensors .* seems to be a .*; the model is a "):
            load_backbone(model, tmp_path / "other.safetensors")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class TestErrors:
    def refuse(self, model, path, *words):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=path.name) as caught:
            load_checkpoint(model, path)
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in (str(path), *words)), message
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_a_vit_for_a_swin(self, tmp_path):
        torch.save({"model": naver_vit(vit())}, tmp_path / "vit.pth")
        words = "naver-ai ViT", "a ViT of width 32 and depth 2, with learned", "a Swin of width 16 and depth 1-2-1"
        self.refuse(
            swin(), tmp_path / "vit.pth", *words, "missing: ", "unexpected: cls_token", "of another shape: patch"
        )

    def test_mixed_for_axial_and_back(self, tmp_path):
        export(swin(), tmp_path / "mixed.safetensors")
        export(swin("swin_rope_axial_tiny"), tmp_path / "axial.safetensors")
        self.refuse(swin("swin_rope_axial_tiny"), tmp_path / "mixed.safetensors", "4 unexpected", "attn.rope_freqs")
        self.refuse(swin(), tmp_path / "axial.safetensors", "4 missing", "attn.rope_freqs")

    def test_another_depth_of_naver_vit(self, tmp_path):
        torch.save({"model": naver_vit(vit(depth=3))}, tmp_path / "vit.pth")
        self.refuse(vit(), tmp_path / "vit.pth", "depth 3", "rope.freqs (2, 3, 16) for (2, 2, 2, 8)")

    def test_another_number_of_classes(self, tmp_path):
        export(vit(), tmp_path / "vit.safetensors")
        self.refuse(vit(num_classes=7), tmp_path / "vit.safetensors", "head.weight (5, 32) for (7, 32)")

    def test_other_weights(self, tmp_path):
        torch.save({"conv1.weight": torch.ones(3), "bn1.weight": torch.ones(3)}, tmp_path / "resnet.pth")
        self.refuse(swin(), tmp_path / "resnet.pth", "no vision transformer (it starts with conv1.weight, bn1.weight)")

    def test_files_that_are_no_checkpoints(self, tmp_path):
        (tmp_path / "text.pth").write_text("hello")
        (tmp_path / "text.safetensors").write_text("hello")
        (tmp_path / "empty.pth").write_bytes(b"")
        torch.save({"epoch": 3}, tmp_path / "numbers.pth")
        torch.save([torch.ones(2)], tmp_path / "list.pth")
        for name, word in {
            "text.pth": "can't be read",
            "text.safetensors": "isn't a safetensors file",
            "empty.pth": "can't be read",
            "numbers.pth": "holds no state dict",
            "list.pth": "holds no state dict",
        }.items():
            self.refuse(swin(), tmp_path / name, word)
        with pytest.raises(FileNotFoundError):
            load_checkpoint(swin(), tmp_path / "absent.pth")
        with pytest.raises(FileNotFoundError):
            load_checkpoint(swin(), tmp_path / "absent.safetensors")

    def test_files_that_would_run_code(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return (print, ("ran",))

        torch.save({"model": swin().state_dict(), "extra": Payload()}, tmp_path / "bad.pth")
        self.refuse(swin(), tmp_path / "bad.pth", "can't be read as plain tensors", "print")


class TestCommandLine:
    def test_it_says_what_it_did(self, tmp_path, capsys, monkeypatch):
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, **others: create(name, **{**SWIN, **others}))
        written = swin("swin_rope_mixed_rpb_tiny")
        torch.save({"model": reference_swin(written)}, tmp_path / "swin.pth")
        name, target = "swin_rope_mixed_rpb_tiny_patch4_window7_224", tmp_path / "swin.safetensors"
        main([str(tmp_path / "swin.pth"), str(target), "--model", name, "--classes", "5", "--image-size", "128"])
        said = capsys.readouterr().out
        assert "naver-ai or Microsoft Swin" in said
        assert "resized: nothing" in said
        assert str(target) in said
        model = swin("swin_rope_mixed_rpb_tiny")
        load_checkpoint(model, target)
        assert_equal(model, written)

    def test_errors_are_one_line(self, tmp_path, capsys):
        (tmp_path / "text.pth").write_text("hello")
        name = "swin_rope_mixed_tiny_patch4_window7_224"
        with pytest.raises(SystemExit, match="1"):
            main([str(tmp_path / "text.pth"), str(tmp_path / "out.safetensors"), "--model", name])
        assert capsys.readouterr().err.count("\n") == 1
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path / "text.pth"), str(tmp_path / "out.pth"), "--model", name])
        assert not (tmp_path / "out.safetensors").exists()

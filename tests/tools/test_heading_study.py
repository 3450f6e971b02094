"""The heading study: its task is what it says, DRoPE solves it and others don't, and its files are whole."""

import csv
import math

import pytest
import torch

from datamodules.synthetic_scenes import synthetic_scene
from models.poses import wrap
from tools import heading_study as study


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", study.TESTED)
def test_the_target_is_the_sign_of_the_sine_and_turns_are_whole(name):
    headings = study.TESTED[name]
    pose, target = study.draw(4096, headings, generator())
    angle = pose[..., 2]
    assert torch.equal(target > 0.5, (angle[:, 1] - angle[:, 0]).sin() > 0)
    assert abs(target.mean() - 0.5) < 0.05
    turns = ((angle - wrap(angle)) / (2 * math.pi)).round().abs().unique()
    assert turns.tolist() == sorted(set(headings.turns))
    off = wrap(angle[:, 0] - headings.direction).abs()
    assert off.max() <= headings.spread + 1e-9
    assert off.max() > 0.9 * headings.spread


def test_a_role_or_a_place_tells_nothing_without_the_heading():
    pose, target = study.draw(4096, study.ANY, generator())
    for column in (0, 1):
        correlation = torch.corrcoef(torch.stack((pose[:, 1, column], target.double())))[0, 1]
        assert abs(correlation) < 0.06  # 4 σ of 4096 samples


@pytest.mark.parametrize("variant", study.VARIANTS)
def test_whole_turns_change_what_is_not_periodic_alone(variant):
    torch.manual_seed(1)
    model = study.VARIANTS[variant]()
    pose, _ = study.draw(64, study.ANY, generator())
    turned = pose.clone()
    turned[:, 1, 2] += 4 * math.pi
    with torch.no_grad():
        change = (model(pose) - model(turned)).abs().max()
    periodic = variant.startswith("drope") or variant in ("absolute (cos, sin)", "none")
    assert change < 1e-5 if periodic else change > 1e-3


def test_variants_have_equal_attention_and_readout():
    counts = {
        name: sum(p.numel() for part in (m.attention, m.read, m.role) for p in part.parameters())
        for name, m in ((name, make()) for name, make in study.VARIANTS.items())
    }
    assert len(set(counts.values())) == 1


def test_drope_learns_it_and_what_is_not_periodic_does_not():
    further = study.TESTED["any, ±3–6 turns"]
    scores = {
        name: study.accuracy(study.train(name, study.ANY, seed=0, steps=120, batch=128), further, generator(9), 2048)
        for name in ("drope_intra", "rope (half turns)", "absolute (raw heading)")
    }
    assert scores["drope_intra"] >= 0.98
    assert max(v for k, v in scores.items() if k != "drope_intra") < 0.8


def test_recorded_whole_turns_move_the_logits_of_rope_alone():
    scenes = [synthetic_scene(5, agents=12, turns=2), synthetic_scene(6, agents=12, turns=0)]
    changes = {(c.scenario_id, c.variant): c for c in study.robustness(scenes, stride=30)}
    turned, wrapped = (scene.scenario_id for scene in scenes)
    for variant in ("drope_intra", "drope_head", "drope_harmonic"):
        assert changes[turned, variant].largest < 1e-5  # float32 headings lose digits when they are wrapped
    assert changes[turned, "rope"].largest > 0.1
    assert changes[turned, "rope"].outside > 0.3
    assert changes[wrapped, "rope"].largest < 1e-5


def test_report_and_csv_hold_the_same_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "VARIANTS", {k: study.VARIANTS[k] for k in ("drope_intra", "rope")})
    monkeypatch.setattr(study, "load_embedded", lambda: [synthetic_scene(5, agents=6, turns=2)])
    out = tmp_path / "results" / "heading.md"
    study.main(["--seeds", "2", "--steps", "2", "--samples", "256", "--out", str(out)])
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = [row for row in rows if row["measure"] == "accuracy"]
    assert len(scores) == 2 * len(study.TRAINED) * 2 * len(study.TESTED)
    mine = [
        100 * float(row["value"])
        for row in scores
        if (row["variant"], row["trained"], row["tested"]) == ("rope", "one way", "any, wrapped")
    ]
    assert f"{sum(mine) / 2:.1f} ({min(mine):.1f}–{max(mine):.1f})" in out.read_text()
    assert out.read_text() in capsys.readouterr().out
    assert sorted(p.name for p in out.parent.iterdir()) == ["heading.csv", "heading.md"]


def test_an_unreachable_source_is_said(tmp_path, monkeypatch, capsys):
    def unreachable():
        raise study.SourceError("metadrive-simulator: no network")

    monkeypatch.setattr(study, "VARIANTS", {"none": study.VARIANTS["none"]})
    monkeypatch.setattr(study, "load_embedded", unreachable)
    study.main(["--seeds", "1", "--steps", "1", "--samples", "64", "--out", str(tmp_path / "h.md")])
    assert "no network" in capsys.readouterr().err
    assert "Not measured" in (tmp_path / "h.md").read_text()


@pytest.mark.parametrize(
    ("bad", "said"), [(["--seeds", "0"], "must be at least 1"), (["--out", "x.txt"], "x.txt: the report is Markdown")]
)
def test_bad_arguments_end_in_one_line(bad, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["--out", str(tmp_path / "h.md"), *bad])
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())

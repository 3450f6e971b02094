"""Rows from many processes land whole in one file; the table averages checkpoints and keeps the last row of each."""

from concurrent.futures import ProcessPoolExecutor

import pytest

from results import SweepReport, append_row, curves, draw, print_point, read_rows, report, rows_of


def row(model, resolution, top1, ckpt="a", scaling="identity"):
    return {"model": model, "resolution": resolution, "scaling": scaling, "top1": top1, "split": "test", "ckpt": ckpt}


def _append(arguments):
    path, number = arguments
    append_row(path, {"model": f"m{number}", f"column{number % 3}": number})


def test_concurrent_rows_are_all_kept(tmp_path):
    path = tmp_path / "results.csv"
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_append, [(path, number) for number in range(12)]))
    rows = read_rows(path)
    assert {r["model"] for r in rows} == {f"m{number}" for number in range(12)}
    assert set(rows[0]) == {"model", "column0", "column1", "column2"}
    assert all(r[f"column{int(r['model'][1:]) % 3}"] == r["model"][1:] for r in rows)


def test_curves_average_checkpoints_and_keep_the_last_row_of_each():
    rows = [row("mixed", "32", "0.1"), row("mixed", "32", "0.5"), row("mixed", "32", "0.7", ckpt="b")]
    assert curves(rows, "top1")["mixed", "identity"]["32"] == [0.5, 0.7]


def test_the_figure_and_the_table(tmp_path, capsys):
    path = tmp_path / "results.csv"
    for model, top1 in (("ape", 0.5), ("mixed", 0.75)):
        for resolution in ("32", "32x64", "64"):
            append_row(path, {**row(model, resolution, top1), "trained_at": 32})
    report(path)
    said = capsys.readouterr().out
    assert "75.0" in said
    assert "50.0" in said
    assert said.index("32x64") < said.index("64", said.index("32x64") + 5)
    assert (tmp_path / "resolution.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*partial*"))


def test_an_empty_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.csv: no rows"):
        report(tmp_path / "nothing.csv")


def test_draw_replaces_the_figure_whole(tmp_path):
    rows = [row("ape", "32", "0.5"), row("ape", "64", "0.4")]
    draw(rows, tmp_path / "x.png")
    first = (tmp_path / "x.png").stat().st_ino
    draw(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_ino != first


def test_metrics_become_a_row_a_policy(capsys):
    assert rows_of({"test/top1": 0.5, "test/loss": 1.0}) == [{"top1": 0.5, "loss": 1.0}]
    rows = rows_of({"test/model/ade": 1.0, "test/still/ade": 2.0, "test/model/nll": 3.0})
    assert rows == [{"policy": "model", "ade": 1.0, "nll": 3.0}, {"policy": "still", "ade": 2.0}]
    print_point([{"agents": 8, **row} for row in rows])
    said = capsys.readouterr().out
    assert "agents=8" in said
    assert "still" in said


def test_a_sweep_reports_means_over_checkpoints_beside_other_policies(tmp_path, capsys):
    path = tmp_path / "results.csv"
    for seed, loss in ((0, 1.0), (1, 2.0), (1, 3.0)):  # the second seed was evaluated twice: its last row counts
        for policy, value in (("model", loss), ("still", "")):
            about = {"model": "small", "policy": policy, "agents": 16, "ckpt": f"seed{seed}"}
            append_row(path, {**about, "loss": value, "cost_ms": 5})
    append_row(path, {"model": "other", "top1": 0.5, "ckpt": "x"})
    report = SweepReport("agents", ["loss", "cost_ms"])
    report.report(path)
    said = capsys.readouterr().out
    assert "2.000 ± 1.000" in said
    assert "still" in said
    assert "other" not in said
    assert (tmp_path / "sweep_agents.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no rows with pos"):
        SweepReport("pos", ["loss"]).report(path)

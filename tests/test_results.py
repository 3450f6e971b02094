"""Rows from many processes land whole in one file; what is drawn averages checkpoints, the last row of each."""

from concurrent.futures import ProcessPoolExecutor

import pytest

from results import (
    HeatMap,
    ResolutionFigure,
    SweepReport,
    append_row,
    curves,
    draw,
    print_point,
    read_rows,
    report,
    rows_of,
    sweep_reports,
)


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


def test_rows_of_other_data_and_splits_are_other_lines():
    rows = [
        {**row("mixed", "32", "0.1"), "data": "coco"},
        {**row("mixed", "32", "0.5"), "data": "mine"},
        {**row("ape", "32", "0.2"), "data": "coco"},
    ]
    assert {line for line, _ in curves(rows, "top1")} == {"mixed, on coco", "mixed, on mine", "ape"}
    rows[1]["data"] = ""  # a row from before there was such a column
    assert {line for line, _ in curves(rows, "top1")} == {"mixed", "ape"}
    rows = [row("mixed", "32", "0.1"), {**row("mixed", "32", "0.5"), "split": "val"}]
    assert {line for line, _ in curves(rows, "top1")} == {"mixed, split test", "mixed, split val"}


def test_windows_that_grow_with_the_image_are_one_line():
    growing = [
        {**row("mixed", side, "0.1"), "crop": side, "stride": str(int(side) * 2 // 3)} for side in ("96", "192", "384")
    ]
    fixed = [{**row("mixed", "192", "0.2"), "crop": "96", "stride": stride} for stride in ("64", "32")]
    assert {line: list(points) for (line, _), points in curves([*growing, *fixed], "top1").items()} == {
        "mixed, windows of the short side, 0.67 of it apart": ["96", "192", "384"],
        "mixed, windows of 96, 64 apart": ["192"],
        "mixed, windows of 96, 32 apart": ["192"],
    }


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


def test_a_short_row_is_a_line_and_a_long_one_a_table(capsys):
    print_point([{"model": "lm", "loss": 1.5}])
    assert capsys.readouterr().out == "model=lm  loss=1.5\n"
    places = {f"loss_at_{place}": place / 8 for place in range(20)}
    print_point([{"model": "lm", **places}])
    said = [line.strip(" │┃").split() for line in capsys.readouterr().out.splitlines()]
    assert ["model", "┃", "lm"] in said
    assert all([name, "│", str(value)] in said for name, value in places.items())


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


def test_metrics_of_parts_name_their_column_beside_the_row_of_the_whole(capsys):
    metrics = {"test/loss": 1.0, "test/0.25/accuracy": 0.5, "test/accuracy": 0.75, "test/0.75/accuracy": 1.0}
    rows = rows_of(metrics, "depth")
    assert rows == [
        {"depth": "", "loss": 1.0, "accuracy": 0.75},
        {"depth": "0.25", "accuracy": 0.5},
        {"depth": "0.75", "accuracy": 1.0},
    ]
    print_point([{"context": 64, **row, "ckpt": "a"} for row in rows])
    said = capsys.readouterr().out
    assert "all" in said
    assert "0.25" in said


def window(context, ckpt="a", scaling="identity", **others):
    about = {"model": "lm", "context": context, "scaling": scaling, "trained_at": 64, "split": "test", "ckpt": ckpt}
    return {**about, **others}


def written(path, rows):
    for each in rows:
        append_row(path, each)
    return path


def test_each_scaling_has_a_line_of_its_own(tmp_path, capsys):
    rows = [window(64 * 2**i, scaling=s, loss=i + 1.0) for s in ("yarn", "identity") for i in range(5)]
    rows += [window(128, ckpt="b", scaling="yarn", loss=4.0), window("None", loss=9.0)]
    # a part of a point is no point
    path = written(tmp_path / "results.csv", [*rows, window(64, depth="0.5", loss=77.0)])
    report = SweepReport("context", ["loss", "absent"], by=["data", "scaling"])
    points = report.points(read_rows(path))
    assert points["lm, yarn (test)", "128"] == {"loss": [2.0, 4.0]}
    assert points["lm (test)", "64"] == {"loss": [1.0]}
    report.report(path)
    said = capsys.readouterr().out
    assert "3.000 ± 1.000" in said
    assert said.index("1024") < said.index("None")
    assert "77" not in said
    assert (tmp_path / "sweep_context.png").is_file()


def test_the_figure_marks_what_was_trained(tmp_path, monkeypatch):
    path = written(tmp_path / "results.csv", [window(x, loss=1.0) for x in (64, 128)])
    figures = []
    monkeypatch.setattr("results.save_figure", lambda figure, path: figures.append((figure, path)))
    SweepReport("context", ["loss"], drawn="other.png").report(path)
    ((figure, path),) = figures
    assert path == tmp_path / "other.png"
    (axes,) = figure.axes
    curve, mark = axes.lines
    assert list(curve.get_xdata()) == [64, 128]
    assert list(mark.get_xdata()) == [64, 64]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["64", "128"]


def needles(path):
    rows = [
        window(x, ckpt=ckpt, depth=depth, accuracy=accuracy)
        for x, accuracy in ((128, 0.0), (64, 1.0))
        for depth in ("0.95", "0.05", "0.5")
        for ckpt in ("a", "b")
    ]
    rows += [window(64, depth="0.05", accuracy=0.5), window(64, accuracy=0.9), window(256, depth="0.5", accuracy="nan")]
    return written(path, rows)


def test_a_heat_map_averages_checkpoints_by_their_last_rows(tmp_path, capsys):
    path = needles(tmp_path / "results.csv")
    cells = HeatMap("context", "depth", "accuracy").cells(read_rows(path))["lm (test)"]
    assert len(cells) == 6
    assert cells[0.05, 64] == 0.75
    assert cells[0.95, 64] == 1.0
    assert cells[0.5, 128] == 0.0
    HeatMap("context", "depth", "accuracy").report(path)
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["│", "0.05", "│", "0.75", "│", "0.00", "│"] in said
    assert ["│", "mean", "│", "0.92", "│", "0.00", "│"] in said
    assert (tmp_path / "sweep_needle.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*partial*"))


def test_the_heat_map_shows_each_cell_where_it_belongs(tmp_path, monkeypatch):
    path = needles(tmp_path / "results.csv")
    written(path, [window(64, scaling="yarn", depth="0.5", accuracy=0.25)])
    figures = []
    monkeypatch.setattr("results.save_figure", lambda figure, path: figures.append(figure))
    HeatMap("context", "depth", "accuracy", by=["scaling"]).report(path)
    first, second, colours = figures[0].axes
    assert [axes.get_title() for axes in (first, second)] == ["lm (test)", "lm, yarn (test)"]
    grid = first.images[0].get_array()
    assert grid.tolist() == [[0.75, 0], [1, 0], [1, 0]]
    assert second.images[0].get_array().mask.tolist() == [[True, True], [False, True], [True, True]]
    assert first.images[0].get_clim() == (0, 1)
    assert list(first.lines[0].get_xdata()) == [0.5, 0.5]
    assert {text.xy: text.get_text() for text in first.texts}[1, 0] == "0.00"
    assert colours.get_ylabel() == "accuracy"


def test_a_file_shows_what_each_sweep_would(tmp_path, capsys):
    rows = [window(64, bits_per_byte=2.5, loss=1.7), window(64, depth="0.5", accuracy=1.0), row("ape", "32", 0.5)]
    report(written(tmp_path / "results.csv", rows))
    said = " ".join(capsys.readouterr().out.split())  # titles wrap
    for expected in ("2.500", "accuracy by depth", "top1 (%)"):
        assert expected in said
    assert {path.name for path in tmp_path.glob("*.png")} == {"resolution.png", "sweep_context.png", "sweep_needle.png"}


def dense(model, resolution, **scores):
    about = row(model, resolution, "", ckpt=model)
    return {**about, "trained_at": 96, **scores}


def test_each_metric_has_a_table_and_a_panel_of_the_rows_that_have_it(tmp_path, capsys, monkeypatch):
    rows = [
        dense("detector", "96", ap=0.25, ap50="0.5"),
        dense("detector", "192", ap=0.125, ap50="nan"),
        dense("detector", "96", ap=0.375, ap50="0.625"),  # measured anew
        dense("segmenter", "64x96", miou=0.75),
        {**row("classifier", "32", "0.9"), "trained_at": 96},
    ]
    path = written(tmp_path / "results.csv", rows)
    figures = []
    monkeypatch.setattr("results.save_figure", lambda figure, path, dpi: figures.append((figure, path)))
    ResolutionFigure(["ap", "ap75", "miou", "ap50"]).report(path)
    ((figure, drawn),) = figures
    assert drawn == tmp_path / "resolution.png"
    assert [axes.get_ylabel() for axes in figure.axes] == ["ap (%)", "miou (%)", "ap50 (%)"]  # none of ap75
    lines = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()[:1]}
        for axes in figure.axes
    ]
    assert lines == [
        {"detector": ([96, 192], [37.5, 12.5])},
        {"segmenter": ([(64 * 96) ** 0.5], [75])},
        {"detector": ([96], [62.5])},
    ]
    said = capsys.readouterr().out
    tables = [said.index(f"{metric} (%) by test resolution") for metric in ("ap", "miou", "ap50")]
    assert tables == sorted(tables)
    assert "ap75" not in said
    assert "classifier" not in said
    assert "37.5" in said[tables[0] : tables[1]]
    assert "12.5" in said[tables[0] : tables[1]]
    assert "62.5" in said[tables[2] :]
    assert "nan" not in said


def test_the_sweep_of_resolutions_is_for_classes_boxes_and_pixels():
    (figure,) = [each for each in sweep_reports() if isinstance(each, ResolutionFigure)]
    assert {"top1", "ap", "miou"} <= set(figure.metrics)
    assert figure.own([dense("segmenter", "64", miou="0.5"), dense("detector", "64", ap="nan")]) == [
        dense("segmenter", "64", miou="0.5")
    ]
    with pytest.raises(ValueError, match="no rows with top1 or ap or"):
        figure.report("nothing.csv")


def test_every_sweep_that_shows_something_is_known_once():
    shown = [(type(each).__name__, getattr(each, "drawn", "resolution.png")) for each in sweep_reports()]
    assert len(shown) == len(set(shown)) >= 5


def test_a_heat_map_of_nothing_names_what_it_needs(tmp_path):
    path = written(tmp_path / "results.csv", [window(64, loss=1.0)])
    with pytest.raises(ValueError, match=r"results\.csv: no rows with context, depth and accuracy"):
        HeatMap("context", "depth", "accuracy").report(path)


def test_a_panel_marks_what_its_own_rows_were_trained_at(tmp_path, monkeypatch):
    rows = [dense("detector", "96", ap="0.5"), {**row("classifier", "224", "0.9"), "trained_at": 224}]
    figures = []
    monkeypatch.setattr("results.save_figure", lambda figure, path, dpi: figures.append(figure))
    ResolutionFigure(["top1", "ap"]).report(written(tmp_path / "results.csv", rows))
    marks = [[line.get_xdata()[0] for line in axes.get_lines()[1:]] for axes in figures[0].axes]
    assert marks == [[224], [96]]


def test_averages_and_several_scales_are_lines_of_their_own():
    ways = [{}, {"average": "True"}, {"ratios": "[0.5, 1.0]"}, {"average": "False", "ratios": "[1.0]"}]
    rows = [{**row("m", "32", str(value)), **way} for value, way in enumerate(ways)]
    found = {model: values["32"] for (model, _), values in curves(rows, "top1").items()}
    assert found == {"m": [3.0], "m, average True": [1.0], "m, ratios [0.5, 1.0]": [2.0]}


def test_models_trained_at_different_sizes_are_not_averaged():
    rows = [{**row("m", "32", value, ckpt=size), "trained_at": size} for size, value in (("32", "0.5"), ("64", "0.9"))]
    found = {model: values["32"] for (model, _), values in curves(rows, "top1").items()}
    assert found == {"m, trained at 32": [0.5], "m, trained at 64": [0.9]}

"""The learning rates of the paper's recipes at chosen moments, and the warm-up that leaves nothing."""

import math

import pytest
import torch

from tasks.schedules import Cosine


def rates(schedule, lr, epochs, steps, moments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule(optimizer, epochs=epochs, steps=steps)
    found = []
    for moment in moments:
        (scheduler.step if schedule.by_epoch else scheduler.step_update)(moment)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_vit_recipe_by_epoch():
    schedule = Cosine(warmup=5, start=1e-6, floor=1e-5, by_epoch=True)
    found = rates(schedule, 4e-3, 400, 250_000, [0, 1, 5, 200, 399])

    def cosine(epoch):
        return 1e-5 + 0.5 * (4e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 400))

    expected = [1e-6, 1e-6 + (4e-3 - 1e-6) / 5, cosine(5), cosine(200), cosine(399)]
    assert found == pytest.approx(expected, rel=1e-9)


def test_swin_recipe_by_step_starts_its_cosine_after_the_warmup():
    schedule = Cosine(warmup=20, start=1e-6, floor=1e-5, after_warmup=True)
    per_epoch = 1251
    found = rates(schedule, 1e-3, 300, 300 * per_epoch, [0, 10 * per_epoch, 20 * per_epoch, 160 * per_epoch])
    assert found[0] == pytest.approx(1e-6)
    assert found[1] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 2, rel=1e-9)
    assert found[2] == pytest.approx(1e-3, rel=1e-9)
    assert found[3] == pytest.approx(1e-5 + (1e-3 - 1e-5) / 2, rel=1e-9)


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match="warm-up of 5 epochs leaves none of the 3"):
        rates(Cosine(warmup=5, start=0.0, floor=0.0), 1.0, 3, 30, [])

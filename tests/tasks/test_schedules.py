"""The learning rates of the paper's recipes at chosen moments, and the warm-up that leaves nothing."""

import math

import pytest
import torch

from tasks.schedules import Cosine, Drops, Polynomial


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


def test_drops_at_fractions_of_the_run():
    schedule = Drops(at=[0.5, 11 / 12], warmup_steps=100)
    found = rates(schedule, 1e-4, 12, 90_000, [0, 50, 100, 44_999, 45_000, 82_499, 82_500, 89_999])
    assert found == pytest.approx([0, 5e-5, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6], rel=1e-9)


def test_a_line_to_zero_under_its_warmup():
    found = rates(Polynomial(warmup_steps=1500), 5e-5, 1, 160_000, [0, 750, 1500, 80_000, 120_000, 160_000])
    expected = [0, 2.5e-5, 5e-5 * (1 - 1500 / 160_000), 2.5e-5, 1.25e-5, 0]
    assert found == pytest.approx(expected, rel=1e-9)


def test_groups_keep_their_share_of_the_rate():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "lr_scale": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = Drops(at=[0.5])(optimizer, epochs=1, steps=10)
    for step, rate in ((0, 1.0), (5, 0.1)):
        scheduler.step_update(step)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, 0.1 * rate])


@pytest.mark.parametrize("at", [[0.9, 0.5], [1.0], [0.0]])
def test_drops_outside_the_run_are_refused(at):
    with pytest.raises(ValueError, match="rising fractions"):
        rates(Drops(at=at), 1.0, 1, 10, [])


@pytest.mark.parametrize("schedule", [Drops(at=[0.5], warmup_steps=10), Polynomial(warmup_steps=10)])
def test_a_warmup_of_all_steps_is_refused(schedule):
    with pytest.raises(ValueError, match="10 steps leaves none of the 10"):
        rates(schedule, 1.0, 1, 10, [])

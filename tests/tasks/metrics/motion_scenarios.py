"""Seeded motion-forecasting scenarios as nested lists, needing neither torch nor TensorFlow: the goldens' and the tests' input.

`random.Random.random` gives the same numbers in every Python.
"""

import math
import random

STEPS, NOW, STRIDE, PREDICTIONS = 91, 10, 5, 16


def _track(draw):
    speed = draw.choice((0.0, 0.5, 1.2, 2.5, 6.0, 12.0, 20.0))
    turn = draw.choice((0.0, 0.0, 0.05, -0.05, 0.2, -0.2, 0.45, -0.45))
    x, y, heading = draw.uniform(-15, 15), draw.uniform(-15, 15), draw.uniform(-math.pi, math.pi)
    length, width = draw.uniform(0.5, 6), draw.uniform(0.4, 2.5)
    states = []
    for _ in range(STEPS):
        velocity = (speed * math.cos(heading), speed * math.sin(heading))
        wrapped = math.remainder(heading, 2 * math.pi)
        states.append([x, y, length, width, wrapped, *velocity])
        x, y, heading = x + 0.1 * velocity[0], y + 0.1 * velocity[1], heading + 0.1 * turn
    kind, valid = draw.randrange(6), [True] * STEPS
    if kind == 0:
        valid = [draw.random() < 0.5 for _ in range(STEPS)]
    elif kind == 1:
        valid = [step < draw.randrange(5, 91) for step in range(STEPS)]
    elif kind == 2:
        born = draw.randrange(60)
        valid = [step >= born for step in range(STEPS)]
    # Waymo's op leaves out tracks that are never valid and then counts the others anew, so each has one valid step.
    if not any(valid):
        valid[draw.randrange(STEPS)] = True
    return [state if fine else [0.0] * 7 for state, fine in zip(states, valid, strict=True)], valid


def _normal(draw):
    return math.sqrt(-2 * math.log(1 - draw.random())) * math.cos(2 * math.pi * draw.random())


def _prediction(draw, members, tracks, scale):
    """(n, 16, 2): the record with an error that grows along the way, and some noise."""
    joint = []
    for member in members:
        error = (scale * _normal(draw), scale * _normal(draw))
        path = []
        for step in range(PREDICTIONS):
            state = tracks[member][NOW + STRIDE * (step + 1)]
            grown = (step + 1) / PREDICTIONS
            path.append([state[axis] + error[axis] * grown + 0.05 * _normal(draw) * (scale > 0) for axis in (0, 1)])
        joint.append(path)
    return joint


def scenarios(seed, count=24, agents=10, groups=3, modes=6, members=1, scales=(1.0, 3.0, 8.0, 20.0)):
    """A list of scenarios: dicts of trajectories (m, k, n, 16, 2), scores (m, k), states (a, 91, 7), valid (a, 91),
    indices (m, n), mask (m, n) and types (a,). A state is x, y, length, width, heading and two velocities."""
    draw = random.Random(seed)
    return [_scenario(draw, agents, groups, modes, members, scales) for _ in range(count)]


def _scenario(draw, agents, groups, modes, members, scales):
    tracks = [_track(draw) for _ in range(agents)]
    states, valid = [list(part) for part in zip(*tracks, strict=True)]
    indices = [draw.sample(range(agents), members) for _ in range(groups)]
    mask = [[place == 0 or draw.random() < 0.7 for place in range(members)] for _ in range(groups)]
    trajectories = [[_prediction(draw, row, states, draw.choice(scales)) for _ in range(modes)] for row in indices]
    return {
        "trajectories": trajectories,
        # Quarters, so that equal confidences occur.
        "scores": [[draw.randrange(5) / 4 for _ in range(modes)] for _ in range(groups)],
        "states": states,
        "valid": valid,
        "indices": indices,
        "mask": mask,
        "types": [draw.randrange(1, 5) for _ in range(agents)],
    }


def hits_and_misses(seed, repeats):
    """Scenarios whose predictions equal the record or are far from it, so that it is known which match.

    Args:
        seed: of the numbers.
        repeats: whether matches after an agent's first keep their place. Otherwise they are sent away at confidence 0, below
            all others: what is then left of mAP is soft mAP.
    """
    found = scenarios(seed, scales=(0, 1e4))
    draw = random.Random(seed + 1)
    for scenario in found:
        for group, member in zip(range(len(scenario["scores"])), scenario["indices"], strict=True):
            scores = scenario["scores"][group] = [draw.randrange(1, 9) / 8 for _ in scenario["scores"][group]]
            record = [scenario["states"][member[0]][NOW + STRIDE * (step + 1)][:2] for step in range(PREDICTIONS)]
            paths = [mode[0] for mode in scenario["trajectories"][group]]
            hits = [mode for mode, path in enumerate(paths) if path == record]
            # sorted() is stable: of equal confidences the first comes first.
            for mode in sorted(hits, key=lambda mode: -scores[mode])[1:]:
                if not repeats:
                    scores[mode] = 0.0
                    scenario["trajectories"][group][mode][0] = [[x + 1e4, y] for x, y in record]
    return found


CASES = {
    "marginal": lambda: scenarios(1),
    "one mode": lambda: scenarios(2, modes=1, scales=(0, 1.0, 3.0)),
    "nine modes": lambda: scenarios(3, modes=9),
    "pairs": lambda: scenarios(4, members=2),
    "triples": lambda: scenarios(5, groups=2, members=3, scales=(0.5, 2.0, 6.0)),
    "hits and misses": lambda: hits_and_misses(6, repeats=True),
    "soft hits and misses": lambda: hits_and_misses(6, repeats=False),
}

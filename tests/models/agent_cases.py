"""Agent models as the configs build them, and random scenes to feed them."""

import math
from functools import cache
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from models.agent_tokens import AgentTokens, MapTokens
from models.kinematic_head import KinematicHead
from models.mixture_head import MixtureHead
from models.poses import compose as place
from models.token_head import TokenHead
from models.vocabulary import sampled

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
POS = sorted(path.stem for path in (CONFIGS / "pos").glob("*.yaml"))
ROTARY = ["drope_intra", "drope_head", "drope_harmonic"]
HEADS = {
    "token": lambda width: TokenHead(width, sampled(48, pool=1000)),
    "kinematic": lambda width: KinematicHead(width, 7, 7),
    "mixture": lambda width: MixtureHead(width, 4),
}


@cache
def config(size, pos, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(overrides=[f"+model=agents_{size}", f"+pos={pos}", "model.head=null", *overrides]).model


def agent_model(pos="drope_intra", *overrides, size="ci", head="token", seed=0):
    """float64, with weights drawn from `seed`."""
    torch.manual_seed(seed)
    cfg = config(size, pos, *overrides)
    return instantiate(cfg, head=HEADS[head](cfg.width)).double()


def agents(count=6, steps=5, scenes=2, seed=1, spread=40.0):
    """Agents that move by motions of a unicycle's order, each pose where the motion ends; a tenth of tokens is invalid."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pose = torch.cat((spread * normal(scenes, count, 2), 6 * normal(scenes, count, 1)), -1)
    sub = torch.linspace(0.2, 1, 5, dtype=torch.float64)[:, None]
    poses, motions = [], []
    for _ in range(steps):
        motion = sub * torch.cat((3 + normal(scenes, count, 1), 0.3 * normal(scenes, count, 2)), -1)[..., None, :]
        pose = place(pose, motion[..., -1, :])
        poses.append(pose)
        motions.append(motion)
    valid = torch.rand(scenes, count, steps, generator=generator) > 0.1
    valid[:, 0] = True
    valid[..., -1] = True
    kind = torch.randint(0, 3, (scenes, count), generator=generator)
    size = 1 + normal(scenes, count, 3).abs()
    speed = 6 + normal(scenes, count, steps)
    return AgentTokens(torch.stack(poses, 2), torch.stack(motions, 2), speed, valid, kind, size)


def pieces(count=12, scenes=2, seed=2, spread=40.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pose = torch.cat((spread * normal(scenes, count, 2), 6 * normal(scenes, count, 1)), -1)
    points = torch.tensor([[2.5, 0], [5, 0]], dtype=torch.float64) + 0.2 * normal(scenes, count, 2, 2)
    kind = torch.randint(0, 12, (scenes, count), generator=generator)
    light = torch.randint(0, 9, (scenes, count), generator=generator)
    valid = torch.ones(scenes, count, dtype=torch.bool)
    return MapTokens(pose, points, kind, light, valid)


def moved(tokens, x=0.0, y=0.0, turn=0.0):
    """All poses of a scene by one rigid motion."""
    c, s = math.cos(turn), math.sin(turn)
    px, py, heading = tokens.pose.unbind(-1)
    return tokens._replace(pose=torch.stack((c * px - s * py + x, s * px + c * py + y, heading + turn), -1))


def scene(tokens, index):
    return type(tokens)(*(t[index : index + 1] for t in tokens))

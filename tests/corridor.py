"""A small world of Gymnasium's API: a light in a corridor, which the actions 4, 5 and 6 move left, not, and right."""

from typing import ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

SIZE = 9
SPACES = {
    "discrete": spaces.Discrete(3, start=4),
    "box": spaces.Box(-1, 1, (2,), np.float32),
    "multi": spaces.MultiDiscrete([2, 3]),
    "binary": spaces.MultiBinary(2),
    "text": spaces.Text(3),
}


class Corridor(gymnasium.Env):
    """Pictures of 9 x 9 pixels with one bright column; a step gives 0.5, and an episode ends at either wall."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, render_mode=None, kind="discrete", draws=True):
        self.kind, self.draws, self.render_mode = kind, draws, render_mode
        self.action_space = SPACES[kind]
        self.observation_space = spaces.Box(0, SIZE, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = SIZE // 2
        return self._observation(), {}

    def step(self, action):
        self.place += int(action) - 5 if self.kind == "discrete" else self.np_random.integers(-1, 2)
        return self._observation(), 0.5, self.place in (0, SIZE - 1), False, {}

    def render(self):
        picture = np.full((SIZE, SIZE, 3), 20, np.uint8)
        picture[:, self.place] = 240
        return picture if self.draws else None

    def _observation(self):
        return np.array([self.place], np.float32)


class Blind(Corridor):
    metadata: ClassVar[dict] = {"render_modes": ["human"]}


gymnasium.register("Corridor-v0", Corridor)
gymnasium.register("Blind-v0", Blind)

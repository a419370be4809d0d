"""What there is to see on a terminal while outputs are made."""

import sys

from tqdm import tqdm

from jaxspd.spectral.plan import Plan


class ProgressBar:
    """Steps done of all outputs, with stage, grid and σ."""

    def __init__(self, plan: Plan, outputs: int, shown: bool):
        self.plan = plan
        self.bar = tqdm(total=plan.steps * outputs, disable=not shown, unit="step", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def __call__(self, stage: int, step: int, sigma: float) -> None:
        h, w = self.plan.stages[stage].latent
        self.bar.set_description_str(
            f"stage {stage + 1}/{len(self.plan.stages)} · {h}×{w} · σ {sigma:.3f}", refresh=False
        )
        self.bar.update()


def say(line: str) -> None:
    """Prints `line` on stdout at once, above the bar where there is one."""
    with tqdm.external_write_mode(sys.stdout):
        print(line, flush=True)

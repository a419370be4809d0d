"""The progress bar and the lines on a terminal while outputs are made."""

import sys
from contextlib import AbstractContextManager

from tqdm import tqdm

from jaxspd.sampling.loop import Step
from jaxspd.signals import undisturbed
from jaxspd.spectral.plan import Plan


class ProgressBar:
    """A bar of the finished steps of all outputs, with stage, grid and σ."""

    def __init__(self, plan: Plan, outputs: int, shown: bool):
        self.plan, self.outputs, self.shown = plan, outputs, shown
        self.bar: tqdm | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def begin(self) -> None:
        """Shows the bar and starts its clock. It is called late, because the request may fail before."""
        steps = self.plan.steps * self.outputs
        self.bar = tqdm(total=steps, disable=not self.shown, unit="step", file=sys.stderr)

    def __call__(self, step: Step) -> None:
        assert self.bar is not None, "the bar begins before the first step ends"
        h, w = self.plan.stages[step.stage].latent
        self.bar.set_description_str(
            f"stage {step.stage + 1}/{len(self.plan.stages)} · {h}×{w} · σ {step.reached:.3f}", refresh=False
        )
        self.bar.update()


def say(line: str) -> None:
    """Prints `line` on stdout at once, above the bar if there is one."""
    with undisturbed(), tqdm.external_write_mode(sys.stdout):
        print(line, flush=True)


def aside() -> AbstractContextManager[None]:
    """A context that hides the bar, so that notices have lines of their own."""
    return tqdm.external_write_mode(sys.stderr)

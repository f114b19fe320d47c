"""How much the draws of K in one step add to the variance of the step's gradient.

`random_k` draws K, the number of last calls that carry gradient, once for each group of images. A
step of B images in D groups makes D draws. Here the gradient of N images for every K of the range
is measured one by one, on a fresh LoRA or after some steps, and from these the variance of the
step's gradient for any D is exact arithmetic. With g(n, k) = m + a_n + b_k + c_nk, images n and
draws of K independent:

    variance = |a|^2 / B  +  |c|^2 / B  +  |b|^2 / D
               images        both          K

where |a|^2 is the mean over n, and so on. Stratified draws, u_j = (pi(j) + U_j) / D and K by the
inverse of its distribution function, pi a random permutation of the D groups, leave of the last
term what varies inside a stratum. All is relative to |m|^2. Components are estimated without bias
from pairs of different images. A simulation that draws images and K from the N measured ones checks
the formula with the components of those N as they are, and gives the cosine with the mean gradient.

Run:  python tests/benchmarks/window_group.py
      python tests/benchmarks/window_group.py --trained 20
      python tests/benchmarks/window_group.py --images 64 --set sample.num_inference_steps=10 \
          --set gradient.k_max=10
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import building
import numpy as np
import torch
from numpy.typing import NDArray
from sides import Report
from torch import Tensor
from torch.nn.utils import parametrize

from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config
from alignprop_cli.estimators import window
from alignprop_cli.lora import layers as lora
from alignprop_cli.planning.request import make_estimator
from alignprop_cli.prompts import PromptStream, load_prompts
from alignprop_cli.training.batches import StepImage
from alignprop_cli.training.record import Totals
from alignprop_cli.training.trainer import Trainer

Array = NDArray[np.float64]


def window_range(config: Config) -> list[int]:
    """Return every K that can be drawn, each as likely as any other."""
    sizes = make_estimator(config.gradient).sizes(config.sample.num_inference_steps)
    assert len(set(sizes.values())) == 1, "gradient.method has to be random_k"
    return sorted(sizes)


class Taps:
    """Keeps the gradient of every LoRA weight apart by the network call that it comes from.

    Args:
        network: With a LoRA.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self.call = -1
        self.gradients: dict[tuple[int, str], Tensor] = {}
        self.names: list[str] = []
        network.register_forward_pre_hook(self._count)
        for name, module in sorted(network.named_modules()):
            if ".lora_" in name and isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                self.names.append(name)
                parametrize.register_parametrization(module, "weight", Tap(self, name))

    def _count(self, *_: object) -> None:
        self.call += 1

    def of_call(self, call: int) -> Tensor:
        return torch.cat([self.gradients[call, name].flatten() for name in self.names])


class Tap(torch.nn.Module):
    """The identity, whose gradient is kept."""

    def __init__(self, taps: Taps, name: str) -> None:
        super().__init__()
        self.taps, self.name = taps, name

    def forward(self, weight: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return weight
        key = (self.taps.call, self.name)
        weight = weight.clone()
        weight.register_hook(lambda gradient: self.taps.gradients.__setitem__(key, gradient))
        return weight


class Chains:
    """Single images of a trainer's coming step, and of as many more as are asked for.

    Args:
        trainer: Whose LoRA is measured.
        prompts: To train on.
    """

    def __init__(self, trainer: Trainer, prompts: Sequence[str]) -> None:
        self.trainer = trainer
        self.calls = len(trainer.schedule)
        self._merged = lora.Merged(trainer.model.network.module)
        self._stream = PromptStream(list(prompts), trainer.settings.seed)

    def run(self, number: int, k: int) -> tuple[Tensor, Tensor]:
        """Return clean latents with the graph of the last k calls, and their gradient of the loss.

        Args:
            number: Of the image within the step.
            k: Calls with gradient.
        """
        trainer, size = self.trainer, self.trainer.settings.batch_size
        prompt = self._stream.prompt(trainer.step_number * size + number)
        path = window(self.calls - k, self.calls)
        batch = [StepImage(number, prompt, path, trainer.schedule)]
        starts = trainer.roll_out(batch, self._merged)
        ends = trainer.run_path(batch, starts[number][None], self._merged)
        # A step has the mean of its images' losses; this is the loss of one.
        return ends, size * trainer.score(batch, ends.detach(), Totals(trainer.mixture.metrics))

    def gradient(self, number: int, k: int) -> Tensor:
        """Return the gradient of the loss of one image as a step computes it, flat."""
        ends, gradient = self.run(number, k)
        weights = list(self.trainer.optimizer.parameters.values())
        return torch.cat([g.flatten() for g in torch.autograd.grad(ends, weights, gradient)])


def gradients(chains: Chains, windows: Sequence[int], images: int) -> Tensor:
    """Return the gradients of all images for every K, (images, Ks, weights).

    One chain with gradient in all calls does for every K: the gradient of the last K calls is the
    sum of what these calls contribute, since what comes after a call does not depend on K.
    """
    direct = [chains.gradient(0, k) for k in windows]
    taps = Taps(chains.trainer.model.network.module)
    found = torch.zeros(images, len(windows), direct[0].numel())
    for number in range(images):
        taps.call = -1
        ends, gradient = chains.run(number, chains.calls)
        taps.gradients.clear()
        ends.backward(gradient)
        parts = [taps.of_call(call) for call in range(chains.calls)]
        for row, k in enumerate(windows):
            found[number, row] = torch.stack(parts[chains.calls - k :]).sum(dim=0)
    for row, gradient in enumerate(direct):
        # The other calls' merged weights round differently.
        assert float((found[0, row] - gradient).norm() / gradient.norm()) < 1e-3
    return found


def products(rows: Tensor) -> Array:
    """Return the inner products of all gradients, (images, Ks, images, Ks)."""
    flat = rows.flatten(0, 1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for columns in flat.split(4096, dim=1):
        total += columns @ columns.T
    return total.numpy().reshape(*rows.shape[:2], *rows.shape[:2])


@dataclass(frozen=True)
class Components:
    """Squared sizes of the parts of a gradient.

    Args:
        mean: |m|^2.
        image: |a|^2, mean over images.
        both: |c|^2, mean over images and K.
        between: (Ks, Ks), inner products of b_k and b_l.
    """

    mean: float
    image: float
    both: float
    between: Array

    def of_k(self, draws: int, stratified: bool) -> float:
        """Return the part of the variance that D draws of K leave."""
        b2 = float(np.trace(self.between)) / len(self.between)
        if not stratified:
            return b2 / draws
        weights = strata(len(self.between), draws)
        kept = np.einsum("sk,kl,sl->", weights, self.between, weights)
        return b2 / draws - float(kept) / draws**2


def strata(values: int, draws: int) -> Array:
    """Return the distribution of K in every stratum, (draws, values)."""
    left, right = np.arange(values) / values, np.arange(1, values + 1) / values
    low, high = (np.arange(draws) / draws)[:, None], (np.arange(1, draws + 1) / draws)[:, None]
    return draws * np.clip(np.minimum(high, right) - np.maximum(low, left), 0.0, None)


def components(gram: Array, *, unbiased: bool) -> Components:
    """Return the components of the population the images are from, or of these images alone."""
    images = len(gram)
    same = np.einsum("nknl->kl", gram) / images
    mixed = gram.sum(axis=(0, 2)) / images**2
    if unbiased:
        mixed = (images * mixed - same) / (images - 1)
    mean = float(mixed.mean())
    per_k = mixed.mean(axis=1)
    between = mixed - per_k[:, None] - per_k[None, :] + mean
    image = float(same.mean()) - mean
    b2 = float(np.trace(between)) / len(between)
    both = float(np.trace(same)) / len(same) - mean - image - b2
    return Components(mean, image, both, between)


@dataclass(frozen=True)
class Simulated:
    """Steps drawn from the measured gradients: relative variance, mean and 5 % of the cosine."""

    variance: float
    cosine: float
    low: float


def simulate(
    gram: Array, batch: int, draws: int, stratified: bool, steps: int, seed: int
) -> Simulated:
    images, values = gram.shape[:2]
    random = np.random.default_rng(seed)
    if stratified:
        order = random.permuted(np.tile(np.arange(draws), (steps, 1)), axis=1)
        uniform = (order + random.random((steps, draws))) / draws
        chosen = np.minimum((uniform * values).astype(int), values - 1)
    else:
        chosen = random.integers(values, size=(steps, draws))
    chosen = np.repeat(chosen, batch // draws, axis=1)
    cells = random.integers(images, size=(steps, batch)) * values + chosen
    share = np.zeros((steps, images * values))
    np.add.at(share, (np.arange(steps)[:, None], cells), 1.0 / batch)
    flat = gram.reshape(images * values, images * values)
    towards = flat.mean(axis=1)
    mean2 = float(towards.mean())
    size2 = np.einsum("sc,sc->s", share @ flat, share)
    inner = share @ towards
    cosine = inner / np.sqrt(size2 * mean2)
    variance = float((size2 - 2.0 * inner + mean2).mean()) / mean2
    return Simulated(variance, float(cosine.mean()), float(np.quantile(cosine, 0.05)))


def average(parts: Sequence[Components]) -> Components:
    count = len(parts)
    return Components(
        sum(part.mean for part in parts) / count,
        sum(part.image for part in parts) / count,
        sum(part.both for part in parts) / count,
        np.mean([part.between for part in parts], axis=0),
    )


def without_largest(gram: Array, share: float) -> Array:
    """Leave out the images with the largest gradients."""
    largest = np.einsum("nknk->nk", gram).max(axis=1)
    kept = np.sort(np.argsort(largest)[: round(len(gram) * (1.0 - share))])
    return gram[kept][:, :, kept]


def describe(points: dict[str, Array]) -> list[str]:
    """Return a table of what the gradients are made of."""
    lines = [
        "| LoRA | mean norm^2 | images a^2 | both c^2 | K b^2 | b^2 / (a^2 + c^2) "
        "| norm of one image: median at least K, at most K, largest |",
        "|---" * 7 + "|",
    ]
    found = {name: components(gram, unbiased=True) for name, gram in points.items()}
    for name, c in {**found, "all": average(list(found.values()))}.items():
        b2 = c.of_k(1, stratified=False)
        row = f"| {name} | {c.mean:.4f} | {c.image:.2f} | {c.both:.2f} | {b2:.5f} "
        row += f"| {b2 / (c.image + c.both):.5f} |"
        if name in points:
            norms = np.sqrt(np.einsum("nknk->nk", points[name]))
            row += f" {np.median(norms[:, 0]):.2f}, {np.median(norms[:, -1]):.2f}, "
            row += f"{norms.max():.1f} |"
        lines.append(row)
    return lines


def variances(points: dict[str, Array], batch: int, counts: Sequence[int], steps: int) -> list[str]:
    """Return a table of the variance for every number of draws."""
    pooled = average([components(gram, unbiased=True) for gram in points.values()])
    noise = (pooled.image + pooled.both) / batch
    lines = [
        f"A step of {batch} images, all LoRAs together: variance over |m|^2, of it "
        f"{pooled.image / batch / pooled.mean:.3f} from images and "
        f"{pooled.both / batch / pooled.mean:.3f} from both, whatever D. Checked by {steps} "
        "simulated steps for each LoRA.",
        "",
        "| D | draws | K | K over images and both | total | formula / simulated "
        "| cosine with the mean, mean | lowest 5 % |",
        "|---" * 8 + "|",
    ]
    for draws, stratified in ((d, s) for d in counts for s in (False, True) if d > 1 or not s):
        of_k = pooled.of_k(draws, stratified)
        ratios: list[float] = []
        runs: list[Simulated] = []
        for number, gram in enumerate(points.values()):
            # The very same images for every D; what a simulation knows is these images alone.
            here = components(gram, unbiased=False)
            runs.append(simulate(gram, batch, draws, stratified, steps, seed=number))
            formula = (here.image + here.both) / batch + here.of_k(draws, stratified)
            ratios.append(formula / here.mean / runs[-1].variance)
        lines.append(
            f"| {draws} | {'stratified' if stratified else 'independent'} "
            f"| {of_k / pooled.mean:.4f} | {100.0 * of_k / noise:.2f} % "
            f"| {(noise + of_k) / pooled.mean:.3f} | {min(ratios):.3f} to {max(ratios):.3f} "
            f"| {np.mean([run.cosine for run in runs]):.4f} "
            f"| {np.mean([run.low for run in runs]):.3f} |"
        )
    return lines


def measure(arguments: argparse.Namespace, seed: int) -> tuple[str, Array]:
    """Return the name of a point and its inner products, kept in a file where asked."""
    flags = {"train.seed": seed}
    config = presets.resolve(preset=arguments.preset, assignments=arguments.set, flags=flags)
    trained = arguments.trained
    name = f"seed {seed}, " + (f"after {trained} steps" if trained else "fresh")
    windows = window_range(config)
    kept = None
    if arguments.keep is not None:
        size = f"{len(windows)}of{config.sample.num_inference_steps}-n{arguments.images}"
        kept = arguments.keep / f"{arguments.preset}-{size}-t{trained}-s{seed}.npy"
        if kept.is_file():
            return name, np.load(kept)
    started = time.perf_counter()
    prompts = load_prompts(config.train.prompts)
    trainer = building.build_trainer(config, building.open_parts(config, prompts))
    for _ in range(trained):
        trainer.step()
    gram = products(gradients(Chains(trainer, prompts), windows, arguments.images))
    print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, gram)
    return name, gram


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=256, help="whose gradients are measured")
    parser.add_argument("--trained", type=int, default=0, help="steps before that")
    parser.add_argument("--batch", type=int, default=32, help="images of a step")
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--simulate", type=int, default=10_000, help="steps to draw")
    parser.add_argument("--without-largest", type=float, default=0.05, help="second table")
    parser.add_argument("--output", type=Path, help="file to append the report to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for what was measured, to be used again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    points = dict(measure(arguments, seed) for seed in arguments.seeds)
    report = Report((__doc__ or "").splitlines()[0], arguments.output)
    for share in (0.0, arguments.without_largest):
        kept = {name: without_largest(gram, share) for name, gram in points.items()}
        text = f"Without the {100 * share:.0f} % of images with the largest gradients:"
        report.add(text if share else "All images:", "", *describe(kept), "")
        report.add(*variances(kept, arguments.batch, arguments.draws, arguments.simulate), "")


if __name__ == "__main__":
    main()

"""Augmentation alone: ours, batched by matrices; kornia's, batched; torchvision's, image by image as in a data loader.

    python benchmarks/augmentation.py      # about 2 minutes

One SimCLR view of a batch from uint8 pictures in memory, one CPU thread, the three in turns. What it decides: whether
our own augmentations are worth their lines (at least 1.5 times kornia). Writes
`benchmarks/results/augmentation.json`.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import kornia.augmentation as K  # noqa: N812 - its documentation's name
import torch
import torchvision.transforms.v2 as T  # noqa: N812
from measure import publish, save
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional

from patchsight_train.randomness import Randomness
from patchsight_train.views import MEAN, STD, View, augment

ROUNDS = 7
CASES = {
    "32 px, no blur, batch 256": {"n": 32, "size": 32, "batch": 256, "blur": 0.0, "s": 0.5},
    "96 px from 144, blur, batch 64": {"n": 144, "size": 96, "batch": 64, "blur": 0.5, "s": 1.0},
}


def ours(size: int, blur: float, s: float) -> Callable[[Tensor], Tensor]:
    view = View(size, jitter=(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s), gray=0.2, blur=blur)
    random = Randomness(Generator().manual_seed(0))
    return lambda images: augment(images, view, random)


def kornia(size: int, blur: float, s: float) -> Callable[[Tensor], Tensor]:
    kernel = size // 20 * 2 + 1
    operators = [
        K.RandomResizedCrop((size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), resample="bicubic"),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
        K.RandomGrayscale(p=0.2),
        *([K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=blur)] if blur else []),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ]
    sequence = K.AugmentationSequential(*operators, data_keys=["input"])
    return lambda images: sequence(images.float() / 255)


def torchvision(size: int, blur: float, s: float) -> Callable[[Tensor], Tensor]:
    """On Pillow images, as lightly and DINO do it; one core stands for one worker."""
    kernel = size // 20 * 2 + 1
    transform = T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], p=0.8),
            T.RandomGrayscale(p=0.2),
            *([T.RandomApply([T.GaussianBlur(kernel, (0.1, 2.0))], p=blur)] if blur else []),
            T.ToImage(),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(MEAN, STD),
        ]
    )
    return lambda images: torch.stack([transform(functional.to_pil_image(image)) for image in images])


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        images = torch.randint(0, 256, (int(case["batch"]), 3, int(case["n"]), int(case["n"])), dtype=torch.uint8)
        size, blur, s = int(case["size"]), case["blur"], case["s"]
        arms = {f.__name__: f(size, blur, s) for f in (ours, kornia, torchvision)}
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(ROUNDS + 1):
            for arm, run in arms.items():
                start = time.process_time()
                run(images)
                times[arm].append((time.process_time() - start) / len(images) * 1e3)
        medians = {arm: statistics.median(found[1:]) for arm, found in times.items()}
        ratios = {
            arm: sorted(b / a for a, b in zip(times["ours"][1:], times[arm][1:], strict=True))
            for arm in ("kornia", "torchvision")
        }
        results[name] = {
            "CPU ms per image": medians,
            "times ours": {arm: [r[0], statistics.median(r), r[-1]] for arm, r in ratios.items()},
        }
    save("augmentation", {"rounds": ROUNDS, "cases": CASES, "results": results})
    lines = [
        "| one SimCLR view | patchsight, CPU ms an image | kornia | torchvision on Pillow images |",
        "| --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        cells = [f"{found['CPU ms per image']['ours']:.2f}"]
        for arm in ("kornia", "torchvision"):
            least, median, most = found["times ours"][arm]
            cells.append(f"{found['CPU ms per image'][arm]:.2f}: {median:.1f}× ({least:.1f} to {most:.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    publish("augmentation", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

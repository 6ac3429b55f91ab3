"""Two ranks against one with the same batch. Under `torchrun` this file is what each rank runs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from patchsight_train import distributed
from patchsight_train.build import build
from patchsight_train.objective import Objective
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.update import Updater

CPU = torch.device("cpu")
B = 8  # images of all ranks
RESNET = {"backbone": "resnet18", "width": None, "depth": None, "heads": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("mae", {}),
    "simclr": ("simclr", {}),
    "simclr-cached": ("simclr", {"micro_batch": 3}),
    "simclr-resnet": ("simclr", RESNET),
    "dino": ("dino", {"freeze_last_layer_epochs": 0}),
    "dino-chunks": ("dino", {"freeze_last_layer_epochs": 0, "micro_batch": 3}),
    "swav": ("swav", {"freeze_prototypes_epochs": 0}),
    "swav-chunks": ("swav", {"freeze_prototypes_epochs": 0, "micro_batch": 3}),
}


def stirred(objective: Objective) -> Objective:
    """At the start all CLS tokens are nearly one, and batch norm would blow their rounding up."""
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return objective


def own(x: Tensor) -> Tensor:
    """This rank's rows."""
    return x.chunk(distributed.world())[distributed.rank()]


def two_steps(chosen: dict[str, Any], objective: str) -> dict[str, Tensor]:
    """What this rank has of two updates with SGD: views, loss, gradients, then parameters and buffers."""
    settings = SETTINGS[objective](**chosen)
    torch.manual_seed(0)
    updater = Updater(stirred(build(settings)), settings, CPU, torch.float32, 10, 5)
    # AdamW divides each gradient by its own size, rounding too.
    updater.optimizer = torch.optim.SGD([{"params": updater.objective.parameters(), "decays": False, "scale": 1.0}])  # type: ignore[assignment]
    images = torch.randint(0, 256, (B, 3, 20, 24), dtype=torch.uint8, generator=Generator().manual_seed(5))
    found: dict[str, Tensor] = {}
    for step in (3, 4):
        views = updater.objective.views(own(images), updater.randomness(step, len(own(images))))
        metrics = updater.update(own(images), step)
        now: dict[str, Any] = {f"view {i}": view for i, view in enumerate(views)}
        now |= {f"metric {name}": torch.tensor(value) for name, value in metrics.items()}
        now |= {f"gradient {name}": p.grad for name, p in updater.objective.named_parameters() if p.grad is not None}
        now |= {f"state {name}": value for name, value in updater.objective.state_dict().items()}
        found |= {f"{step} {name}": sample(value.detach()).clone() for name, value in now.items()}
    return found


def sample(x: Tensor) -> Tensor:
    """Of a ResNet's large tensors a hundredth is told."""
    return x.flatten()[::101] if x.numel() > 10_000 else x.contiguous()


def primitives() -> dict[str, Tensor]:
    """What `distributed` offers, on numbers that tell ranks and rows apart."""
    rank = distributed.rank()
    x = own(torch.arange(12.0).view(6, 2) ** 2).requires_grad_()
    gathered = distributed.gather(x)
    # Each rank weighs all rows its own way: the gradient of a row is the sum of the weights of both.
    (gathered * (rank + 1) * torch.arange(1.0, 7.0).view(6, 1)).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    network = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2, dtype=torch.float64), nn.Linear(2, 1)])
    for i, parameter in enumerate(network.parameters()):
        if i != 1:  # has no gradient on any rank
            parameter.grad = torch.full_like(parameter, 10 * i + rank)
    distributed.average_gradients(network)
    averaged = [p.grad.flatten()[:1] for p in network.parameters() if p.grad is not None]
    distributed.barrier()
    return {
        "gathered": gathered.detach(),
        "gradient": x.grad,
        "mean": distributed.mean_over_ranks(torch.tensor([1.0 + rank, 10.0 * rank])),
        "averaged": torch.cat(averaged),
        "dtypes kept": torch.tensor([p.grad is None or p.grad.dtype == p.dtype for p in network.parameters()]),
        "any of none": torch.tensor(distributed.any_rank(False, CPU)),
        "any of one": torch.tensor(distributed.any_rank(rank == 1, CPU)),
        "rank and world": torch.tensor([rank, distributed.world(), distributed.local_rank()]),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.start(CPU)
    for case, (objective, chosen) in json.loads((folder / "cases.json").read_text()).items():
        save_file(two_steps(chosen, objective), folder / f"{case}-{distributed.rank()}.safetensors")
    distributed.BUCKET = 20  # bytes: several buckets
    found = primitives()
    rank = distributed.rank()
    distributed.stop()
    threads = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    found["threads of gloo left"] = torch.tensor(sum("gloo" in name for name in threads))  # they may abort the exit
    save_file(found, folder / f"primitives-{rank}.safetensors")


@pytest.fixture(scope="module")
def chosen(tiny: Callable[..., dict[str, Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Of each case: the objective, and all its settings."""
    own = {"batch_size": B, "clip_grad": 0, "lr": 0.1}  # a clipped gradient would hide a wrong scale
    return {case: (objective, tiny(objective, **own, **changes)) for case, (objective, changes) in CASES.items()}


@pytest.fixture(scope="module")
def ranks(
    chosen: dict[str, tuple[str, dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[dict[str, Tensor]]]:
    """`ranks("dino")`: what each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "cases.json").write_text(json.dumps(chosen))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, __file__, str(folder)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return lambda case: [load_file(folder / f"{case}-{rank}.safetensors") for rank in (0, 1)]


def assert_near(found: Tensor, expected: Tensor, name: str, relative: float) -> None:
    error = (found.double() - expected.double()).norm().item()
    assert error <= 5e-6 + relative * expected.double().norm().item(), f"{name} is off by {error}"


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_do_as_one(
    case: str, ranks: Callable[[str], list[dict[str, Tensor]]], chosen: dict[str, tuple[str, dict[str, Any]]]
) -> None:
    """Views, loss and metrics, gradients, then parameters, DINO's teacher and center, batch norm's statistics."""
    objective, settings = chosen[case]
    one, both = two_steps(settings, objective), ranks(case)
    assert both[0].keys() == both[1].keys() == one.keys()
    assert {name.split()[1] for name in one} == {"view", "metric", "gradient", "state"}
    for name, expected in one.items():
        if " view " in name:
            assert_near(torch.cat([found[name] for found in both]), expected, name, 1e-6)
        else:
            assert torch.equal(both[0][name], both[1][name]), f"{name} differs between the ranks"
            assert_near(both[0][name], expected, name, 5e-4 if "resnet" in case else 1e-5)


def test_without_the_average_ranks_would_differ(
    ranks: Callable[[str], list[dict[str, Tensor]]], chosen: dict[str, tuple[str, dict[str, Any]]]
) -> None:
    """The two halves of the batch are not alike, so the test above can fail."""
    objective, settings = chosen["dino"]
    one, both = two_steps(settings, objective), ranks("dino")
    first, second = both[0]["3 view 0"], both[1]["3 view 0"]
    assert (first - second).abs().mean() > 0.1
    assert (one["4 state center"] - one["3 state center"]).abs().max() > 1e-3
    assert (one["4 state teacher.norm.weight"] - one["3 state teacher.norm.weight"]).abs().max() > 1e-6


def test_primitives_of_two_ranks(ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    first, second = ranks("primitives")
    squares = torch.arange(12.0).view(6, 2) ** 2
    for rank, found in enumerate((first, second)):
        assert torch.equal(found["gathered"], squares)
        weights = 3 * torch.arange(1.0, 7.0).view(2, 3, 1)[rank]  # 1 of the first rank and 2 of the second
        assert torch.equal(found["gradient"], weights.expand(3, 2))
        assert found["mean"].tolist() == [1.5, 5.0]
        assert found["averaged"].tolist() == [0.5, 20.5, 30.5, 40.5, 50.5]
        assert found["dtypes kept"].all()
        assert not found["any of none"]
        assert found["any of one"]
        assert found["rank and world"].tolist() == [rank, 2, rank]
        assert found["threads of gloo left"] == 0


def test_alone_everything_is_the_identity() -> None:
    found = primitives()
    assert torch.equal(found["gathered"], torch.arange(12.0).view(6, 2) ** 2)
    assert torch.equal(found["gradient"], torch.arange(1.0, 7.0).view(6, 1).expand(6, 2))
    assert found["mean"].tolist() == [1.0, 0.0]
    assert found["averaged"].tolist() == [0.0, 20.0, 30.0, 40.0, 50.0]
    assert not found["any of none"]
    assert not found["any of one"]
    assert found["rank and world"].tolist() == [0, 1, 0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))

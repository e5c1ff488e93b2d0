"""Several processes, each with a clip and noise of its own, are refused."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from psgrad import RefusedModelError
from tests.dp.problems import private


def refused(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting-{ranks}", rank=rank, world_size=ranks)
    try:
        private()
        said = "made private"
    except RefusedModelError as error:
        said = str(error)
    with open(os.path.join(folder, f"{ranks}-{rank}"), "w") as file:
        file.write(said)
    dist.destroy_process_group()


def spawn(ranks: int, folder) -> list[str]:
    mp.spawn(refused, (ranks, str(folder)), nprocs=ranks)
    return [(folder / f"{ranks}-{rank}").read_text() for rank in range(ranks)]


def test_two_ranks_are_refused_on_each_and_one_is_not(tmp_path):
    for said in spawn(2, tmp_path):
        assert "torch.distributed runs with 2 ranks" in said
    assert spawn(1, tmp_path) == ["made private"]

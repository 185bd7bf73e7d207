# SPDX-License-Identifier: Apache-2.0
"""The operations from several Python threads, from DataLoader workers, from a forked process."""

import contextvars
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from nimfast.ops import Stream, corrupt, image_keys, use_backend, votes
from nimfast.ops.backend import choose


def noisy(index: int) -> torch.Tensor:
    """Enough values to be split among threads."""
    keys = image_keys(0, Stream.TRAINING, torch.tensor([index]))
    return corrupt(torch.full((1, 3, 64, 64), index / 10), keys, 0.5, samples=8)


def test_python_threads_do_not_disturb_each_other() -> None:
    expected = [noisy(index) for index in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for found, wanted in zip(pool.map(noisy, range(6)), expected, strict=True):
                assert torch.equal(found, wanted)


def test_threads_add_to_one_tensor_of_counts() -> None:
    logits = torch.randn(20_000, 10, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(1, 11, dtype=torch.int64)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: votes(logits, counts), range(8)))
    assert torch.equal(counts[0], 8 * torch.bincount(logits.argmax(1), minlength=11))


def test_a_forced_back_end_stays_in_its_thread() -> None:
    cpu = torch.device("cpu")
    usual = choose("corrupt", cpu)
    with use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert choose("corrupt", cpu) == "reference"
        assert pool.submit(choose, "corrupt", cpu).result() == usual
        context = contextvars.copy_context()  # handed over on purpose, it goes along
        assert pool.submit(context.run, choose, "corrupt", cpu).result() == "reference"


class Noisy(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return noisy(index)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method: str) -> None:
    expected = torch.stack([noisy(index) for index in range(6)])  # the parent's threads have run
    loader = DataLoader(Noisy(), batch_size=3, num_workers=2, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_process_after_threads_have_run() -> None:
    expected = noisy(3)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # nothing but the operation: pytest must not go on here
        torch.set_num_threads(1)  # as torch's own workers do; OpenMP does not survive a fork
        os.write(write, b"1" if torch.equal(noisy(3), expected) else b"0")
        os._exit(0)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(read, 1) == b"1"

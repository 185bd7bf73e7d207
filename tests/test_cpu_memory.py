# SPDX-License-Identifier: Apache-2.0
"""Memory of large CPU results: kept for the next one, never shared by two, bounded."""

import gc
import os
import threading

import pytest
import torch

from nimfast.ops.backend import large_empty, native

module = native()
pytestmark = pytest.mark.skipif(module is None, reason="it is the compiled module's")
MIB = 1 << 20
LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def nothing_kept():  # type: ignore[no-untyped-def]
    gc.collect()
    module.release_memory()
    yield
    module.release_memory()


def test_memory_is_handed_on_when_the_last_view_is_gone() -> None:
    first = large_empty(LIKE, (4, MIB), torch.bfloat16).fill_(1)
    assert first.is_contiguous()
    assert first.untyped_storage().nbytes() == 8 * MIB
    place, view = first.data_ptr(), first[1:, 5]
    del first
    second = large_empty(LIKE, (4, MIB), torch.bfloat16)
    assert second.data_ptr() != place
    second.fill_(2)
    assert (view == 1).all()
    del view
    assert module.idle_bytes() == 8 * MIB
    # A little less fits too; twice as much does not.
    third, fourth = (large_empty(LIKE, (n * MIB,), torch.float32) for n in (2, 4))
    assert third.data_ptr() == place != fourth.data_ptr()
    assert module.idle_bytes() == 0


def test_small_results_are_ordinary_tensors() -> None:
    small = large_empty(LIKE, (100, 100), torch.float32)
    del small
    assert module.idle_bytes() == 0
    assert large_empty(LIKE, (0, 3), torch.float32).shape == (0, 3)


def test_what_is_kept_is_bounded() -> None:
    made = [large_empty(LIKE, (10 * MIB,), torch.float32) for _ in range(9)]  # never written
    made.append(large_empty(LIKE, (100 * MIB,), torch.float32))
    del made
    assert 0 < module.idle_bytes() <= 256 * MIB
    many = [large_empty(LIKE, (MIB,), torch.float32) for _ in range(40)]
    del many
    assert module.idle_bytes() <= 16 * 40 * MIB
    module.release_memory()
    assert module.idle_bytes() == 0


def test_threads_never_get_the_same_memory() -> None:
    wrong = []

    def work(number: int) -> None:
        for _ in range(50):
            mine = large_empty(LIKE, (MIB // 2,), torch.float32).fill_(number)
            other = mine.clone()
            if not (bool((mine == number).all()) and torch.equal(mine, other)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_has_its_own() -> None:
    kept = large_empty(LIKE, (MIB,), torch.float32).fill_(3)
    del kept  # both processes now get this memory, which the fork has made two
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as a DataLoader's workers do: OpenMP's threads do not survive
        mine = large_empty(LIKE, (MIB,), torch.float32)
        mine.copy_(torch.full((MIB,), 5.0))
        os._exit(0 if float(mine[-1]) == 5 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert float(large_empty(LIKE, (MIB,), torch.float32)[-1]) == 3

# SPDX-License-Identifier: Apache-2.0
"""Peak memory, each case in a process of its own: what the fused operations save."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROGRAM = """
import sys, torch
sys.path.insert(0, "benchmarks")
import published
from nimfast.smoothing import Smooth

class Means(torch.nn.Module):  # nothing of its own to speak of: what is measured is the sampling
    def forward(self, images):
        return images.flatten(1)[:, :10]

def peak():  # MiB; the largest so far, from the system
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith("VmHWM")).split()[1]) / 1024

image = torch.rand(3, 224, 224)
ours = Smooth(Means(), 10, 0.5, precision="bf16")
ours.certify(image, 10, 20, 0.1, 10)  # libraries loaded, buffers of the small kind made
before = peak()
if sys.argv[1] == "nimfast":
    ours.certify(image, 10, 2000, 0.1, 1000)
else:
    published.certify(Means(), image, 0.5, 10, 2000, 0.1, 10)
print(peak() - before)
"""


def peak_of(who: str) -> float:
    command = [sys.executable, "-c", PROGRAM, who]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_certification_at_224_needs_a_third_of_the_published_loop() -> None:
    ours, published = peak_of("nimfast"), peak_of("published")
    assert 3 * ours <= published, f"{ours:.0f} MiB against {published:.0f} MiB"

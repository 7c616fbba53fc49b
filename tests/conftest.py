import os
import tempfile

import pytest
import torch
from hypothesis import settings

# torch.compile's cache takes code for one CPU capability for that of another
if os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR",
        f"{tempfile.gettempdir()}/sqloss-inductor-{os.environ['ATEN_CPU_CAPABILITY']}",
    )

# Derandomized: the same examples on every machine. No deadline: machines are shared.
settings.register_profile("sqloss", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("sqloss")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

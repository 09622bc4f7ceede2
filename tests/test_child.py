"""What every process that a test starts runs first: its stand-in for `torch._dynamo`."""

import subprocess
import sys

CODE = """
import sys
import segmentation_models_pytorch as smp
import torch._dynamo as dynamo

smp.create_model("unet", "tu-test_resnet", encoder_weights=None)
assert "torch._dynamo.eval_frame" not in sys.modules

from torch._dynamo.utils import counters
assert "torch._dynamo.eval_frame" in sys.modules
import torch._dynamo.bytecode_analysis
assert dynamo.config is torch._dynamo.config
twice = torch.compile(lambda number: 2 * number, backend="eager")
assert twice(torch.ones(1)) == 2 and counters["frames"]["ok"] == 1
"""


def test_a_process_imports_torch_dynamo_where_something_needs_it_and_not_before() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr

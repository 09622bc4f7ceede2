"""Where the project's own files lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights"
DATASET_METADATA = ROOT / "dataset-metadata.json"
KERNEL_METADATA = ROOT / "kernel" / "kernel-metadata.json"
SCRIPT = ROOT / "kernel" / "inference.py"
MEMBERS = ROOT / "training" / "members.txt"
NOTEBOOK = "inference.ipynb"  # of SCRIPT, in the bundle
WHEEL_CACHE = ROOT / ".cache" / "wheels"
